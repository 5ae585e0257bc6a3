"""What PyTorch users write, to time against: each method's passes in plain torch, from the equations of docs/methods.md.

published   one tensor after the other; z is drawn, multiplied and added, and every intermediate result is stored
foreach     torch._foreach_*: in place, a list of tensors at a time, z of all of them stored
compiled    the arithmetic of `published`, in place, under torch.compile, which fuses it with a Philox of its own

All take lists of tensors (parameters too) and reseed torch's global generators by `seed`, as the released code does, so
that the same seed gives the same z. States are lists like the tensors', and change with them. Intermediates have torch's
promoted dtype; what is stored has the dtype that it had.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Number = float | Tensor
Tensors = Sequence[Tensor]


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


# Of one tensor: weights, states, direction z, numbers (floats, or tensors of one element) -> new weights, new states. c is
# the projected gradient. The released code multiplies by the direction and by eps, one after the other.


def axpy(w: Tensor, z: Tensor, first: Number, second: Number) -> tuple[Tensor, ...]:
    return (w + first * z * second,)


def scaled_axpy(w: Tensor, h: Tensor, z: Tensor, first: Number, second: Number) -> tuple[Tensor, ...]:
    return (w + first * z * second / torch.sqrt(h),)


def hizoo(w: Tensor, h: Tensor, z: Tensor, c: Number, lr: Number, ak: Number, a: Number) -> tuple[Tensor, ...]:
    """ak = a * kappa."""
    new = (1 - a) * h + ak * h * (z * z)
    return w - lr * (c * z / torch.sqrt(new)), new


def helene(
    w: Tensor, m: Tensor, h: Tensor, z: Tensor, c: Number, lr: Number, alpha: Number, b: Number, s: HeleneSettings
) -> tuple[Tensor, ...]:
    m = s.beta1 * m + alpha * (c * z)
    h = s.beta2 * h + b * (z * z)
    return w - lr * m / (s.gamma * torch.clamp(h, min=s.floor) + s.delta), m, h


EQUATIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {f.__name__: f for f in (axpy, scaled_axpy, hizoo, helene)}


def draw(w: Tensor, distribution: str = "normal") -> Tensor:
    """z in the weights' dtype, from torch's global generator."""
    if distribution == "rademacher":
        return 2 * torch.randint(0, 2, w.shape, dtype=w.dtype, device=w.device) - 1
    return torch.normal(0.0, 1.0, w.shape, dtype=w.dtype, device=w.device)


def in_place(
    equation: Callable[..., tuple[Tensor, ...]],
    lists: Sequence[Tensors],
    numbers: Sequence[Tensor],
    fixed: tuple[Any, ...],
    distribution: str,
) -> None:
    """What is compiled. copy_ rounds to the dtype of what it writes to, and becomes the store of the fused kernel."""
    for tensors in zip(*lists, strict=True):
        new = equation(*tensors, draw(tensors[0], distribution), *numbers, *fixed)
        for old, value in zip(tensors, new, strict=False):
            old.copy_(value)


@dataclass(frozen=True)
class Sweep:
    """One of EQUATIONS over lists of weights and states. fixed: what is the same in all steps."""

    rule: str
    lists: Sequence[Tensors]
    numbers: Sequence[float]
    fixed: tuple[Any, ...] = ()
    distribution: str = "normal"


class Peer(ABC):
    """One way to do a sweep. w: weights; h, m: states; numbers as the equations have them."""

    name: str

    @abstractmethod
    def run(self, sweep: Sweep) -> None:
        """With torch's generators seeded."""

    @torch.no_grad()
    def sweep(self, seed: int, rule: str, *what: Any) -> None:
        torch.manual_seed(seed)
        self.run(Sweep(rule, *what))

    def axpy(self, w: Tensors, seed: int, factors: tuple[float, float], distribution: str = "normal") -> None:
        self.sweep(seed, "axpy", (w,), factors, (), distribution)

    def scaled_axpy(self, w: Tensors, h: Tensors, seed: int, factors: tuple[float, float]) -> None:
        self.sweep(seed, "scaled_axpy", (w, h), factors)

    def hizoo(self, w: Tensors, h: Tensors, seed: int, c: float, lr: float, ak: float, a: float) -> None:
        self.sweep(seed, "hizoo", (w, h), (c, lr, ak, a))

    def helene(self, w: Tensors, m: Tensors, h: Tensors, seed: int, c: float, lr: float, s: HeleneSettings) -> None:
        fixed = replace(s, alpha=0.0, b=0.0)  # these change from step to step
        self.sweep(seed, "helene", (w, m, h), (c, lr, s.alpha, s.b), (fixed,))


class Published(Peer):
    name = "published"

    def run(self, sweep: Sweep) -> None:
        for tensors in zip(*sweep.lists, strict=True):
            data = [t.data for t in tensors]
            new = EQUATIONS[sweep.rule](*data, draw(data[0], sweep.distribution), *sweep.numbers, *sweep.fixed)
            for old, value in zip(tensors, new, strict=False):
                old.data = value.to(old.dtype)


class Foreach(Peer):
    name = "foreach"

    def run(self, sweep: Sweep) -> None:
        w, *states = map(list, sweep.lists)
        if sweep.distribution == "normal":
            z = [torch.randn_like(p.data) for p in w]
        else:
            z = [torch.randint(0, 2, p.shape, dtype=p.dtype, device=p.device) for p in w]
            torch._foreach_mul_(z, 2)
            torch._foreach_sub_(z, 1)
        getattr(self, f"_{sweep.rule}")(w, *states, z, *sweep.numbers, *sweep.fixed)

    def _axpy(self, w: list[Tensor], z: list[Tensor], first: float, second: float) -> None:
        torch._foreach_add_(w, z, alpha=first * second)

    def _scaled_axpy(self, w: list[Tensor], h: list[Tensor], z: list[Tensor], first: float, second: float) -> None:
        torch._foreach_div_(z, torch._foreach_sqrt(h))
        torch._foreach_add_(w, z, alpha=first * second)

    def _hizoo(
        self, w: list[Tensor], h: list[Tensor], z: list[Tensor], c: float, lr: float, ak: float, a: float
    ) -> None:
        change = torch._foreach_mul(z, z)
        torch._foreach_mul_(change, ak)
        torch._foreach_sub_(change, a)
        torch._foreach_addcmul_(h, h, [x.to(y.dtype) for x, y in zip(change, h, strict=True)])
        self._scaled_axpy(w, h, z, -lr, c)

    def _helene(
        self,
        w: list[Tensor],
        m: list[Tensor],
        h: list[Tensor],
        z: list[Tensor],
        c: float,
        lr: float,
        alpha: float,
        b: float,
        s: HeleneSettings,
    ) -> None:
        torch._foreach_mul_(m, s.beta1)
        torch._foreach_add_(m, z, alpha=alpha * c)
        torch._foreach_mul_(z, z)
        torch._foreach_mul_(h, s.beta2)
        torch._foreach_add_(h, z, alpha=b)
        below = torch._foreach_clamp_min(h, s.floor)
        torch._foreach_mul_(below, s.gamma)
        torch._foreach_add_(below, s.delta)
        torch._foreach_div_(below, -lr)  # w + m / (below / -lr)
        torch._foreach_add_(w, torch._foreach_div(m, below))


class Compiled(Peer):
    """Numbers reach the compiled function as tensors, so that a new step's do not compile anew. Compiles on first use.

    group: tensors that make one graph, 0 for all. A model's block is a good group: all blocks share a graph. Each graph
        takes seconds to compile, and one of hundreds of tensors takes minutes.
    """

    name = "compiled"

    def __init__(self, group: int = 0) -> None:
        self._group = group
        # fullgraph also makes it an error, not plain torch, when there are too many graphs of one function.
        self._call = torch.compile(in_place, dynamic=False, fullgraph=True)

    def run(self, sweep: Sweep) -> None:
        w = sweep.lists[0]
        # A fill on the device: copying from the host would wait for it.
        numbers = [torch.full((), value, device=w[0].device) for value in sweep.numbers]
        step = self._group or len(w)
        for start in range(0, len(w), step):
            group = [[t.data for t in tensors[start : start + step]] for tensors in sweep.lists]
            self._call(EQUATIONS[sweep.rule], group, numbers, sweep.fixed, sweep.distribution)


def peers(*, compiled: bool, group: int = 0) -> list[Peer]:
    """All peers, or all but the compiled one."""
    return [Published(), Foreach(), *([Compiled(group)] if compiled else [])]
