"""The methods' updates as plain torch expressions, from the equations of docs/methods.md: what the peers compute.

One function each for one tensor, functional; then each over lists and in place, for torch.compile (k: the numbers). c is
the projected gradient, z the direction; numbers are floats or tensors of one element. Results have torch's promoted
dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Number = float | Tensor


@dataclass(frozen=True)
class HeleneSettings:
    """Of HELENE's update (docs/methods/helene.md); b is the factor of z^2 in the curvature, (1 - beta2) B c^2."""

    alpha: float
    beta1: float
    beta2: float
    b: float
    gamma: float
    floor: float
    delta: float


def draw(w: Tensor, distribution: str = "normal") -> Tensor:
    """z in the weights' dtype, from torch's global generator."""
    if distribution == "rademacher":
        return 2 * torch.randint(0, 2, w.shape, dtype=w.dtype, device=w.device) - 1
    return torch.normal(0.0, 1.0, w.shape, dtype=w.dtype, device=w.device)


def axpy(w: Tensor, z: Tensor, first: Number, second: Number) -> Tensor:
    return w + first * z * second


def scaled_axpy(w: Tensor, h: Tensor, z: Tensor, first: Number, second: Number) -> Tensor:
    return w + first * z * second / torch.sqrt(h)


def hizoo(w: Tensor, h: Tensor, z: Tensor, c: Number, lr: Number, ak: Number, a: Number) -> tuple[Tensor, Tensor]:
    new = (1 - a) * h + ak * h * (z * z)
    return w - lr * (c * z / torch.sqrt(new)), new


def helene(
    w: Tensor, m: Tensor, h: Tensor, z: Tensor, c: Number, lr: Number, alpha: Number, b: Number, s: HeleneSettings
) -> tuple[Tensor, Tensor, Tensor]:
    m = s.beta1 * m + alpha * (c * z)
    h = s.beta2 * h + b * (z * z)
    return w - lr * m / (s.gamma * torch.clamp(h, min=s.floor) + s.delta), m, h


# copy_ rounds to the dtype of what it writes to; torch.compile makes it the store of the fused kernel.
def axpy_(k: list[Tensor], w: list[Tensor], distribution: str) -> None:
    for p in w:
        p.copy_(axpy(p, draw(p, distribution), *k))


def scaled_axpy_(k: list[Tensor], w: list[Tensor], h: list[Tensor]) -> None:
    for p, x in zip(w, h, strict=True):
        p.copy_(scaled_axpy(p, x, draw(p), *k))


def hizoo_(k: list[Tensor], w: list[Tensor], h: list[Tensor]) -> None:
    for p, x in zip(w, h, strict=True):
        new, curvature = hizoo(p, x, draw(p), *k)
        p.copy_(new)
        x.copy_(curvature)


def helene_(k: list[Tensor], w: list[Tensor], m: list[Tensor], h: list[Tensor], s: HeleneSettings) -> None:
    c, lr, alpha, b = k
    for p, y, x in zip(w, m, h, strict=True):
        new, momentum, curvature = helene(p, y, x, draw(p), c, lr, alpha, b, s)
        p.copy_(new)
        y.copy_(momentum)
        x.copy_(curvature)


IN_PLACE: dict[str, Callable[..., None]] = {
    "axpy": axpy_,
    "scaled_axpy": scaled_axpy_,
    "hizoo": hizoo_,
    "helene": helene_,
}
