"""What a step has measured, and the update that each optimizer of the gradient makes of it.

The gradient is sum_k G_k z(seed_k) with G_k = g_k / eps, and its diagonal curvature comes from sum_k V_k z(seed_k)^2. All
coefficients are float64 until a pass rounds them to float32, once; rules are in zokern/contract/rules.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from zokern.passes.update import CPU, Terms, Update, sent


@dataclass(frozen=True)
class Estimate:
    """gradient: g_k, in units of 1/eps; curvature: in units of 1/eps^2; projected: c, in units of 1/eps, for metrics.

    square_of_sum: the curvature goes with (sum_k b_k z_k)^2, b_k being what `curvature` holds, instead of sum_k b_k z_k^2.
    """

    gradient: Terms
    projected: Tensor
    curvature: Terms = field(default_factory=dict)
    square_of_sum: bool = False


@dataclass(frozen=True)
class Rates:
    """Each row's learning rate, perturbation radius and weight decay, float64 [R]."""

    lr: Tensor
    eps: Tensor
    weight_decay: Tensor

    @property
    def decay(self) -> Tensor:
        return 1.0 - self.lr * self.weight_decay

    def on(self, device: torch.device) -> Rates:
        if self.lr.device == self.eps.device == self.weight_decay.device == device:
            return self
        return Rates(sent(self.lr, device), sent(self.eps, device), sent(self.weight_decay, device))


def gradient(estimate: Estimate, eps: Tensor) -> Tensor:
    """G [R, K] of an estimate."""
    return stacked(estimate.gradient) / eps[:, None]


def stacked(terms: Terms) -> Tensor:
    """The values of terms, [K]."""
    values = list(terms.values())
    if set(map(type, values)) != {Tensor}:
        values = [v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float32, device=CPU) for v in values]
    return torch.stack(values)  # type: ignore[arg-type]


def sgd(estimate: Estimate, rates: Rates) -> Update:
    """theta <- (1 - lr*wd) theta - lr sum_k G_k z_k."""
    coefs = -rates.lr[:, None] * gradient(estimate, rates.eps)
    return Update(list(estimate.gradient), {"A": coefs}, {"decay": rates.decay})


def unscaled(estimate: Estimate, rates: Rates) -> Update:
    """theta <- (1 - lr*wd) theta - lr sum_k g_k z_k: the 1/eps of the estimate is left out, as some released code does."""
    coefs = -rates.lr[:, None] * stacked(estimate.gradient)
    return Update(list(estimate.gradient), {"A": coefs}, {"decay": rates.decay})


def sign(estimate: Estimate, rates: Rates) -> Update:
    """theta <- (1 - lr*wd) theta - lr sign(sum_k G_k z_k)."""
    return Update(
        list(estimate.gradient),
        {"G": gradient(estimate, rates.eps)},
        {"decay": rates.decay, "step": -rates.lr},
        "sign",
        {"step": 0.0},
    )


def momentum(estimate: Estimate, rates: Rates, beta: float) -> Update:
    """m <- beta m + sum_k G_k z_k; theta <- (1 - lr*wd) theta - lr m. torch.optim.SGD's momentum."""
    return Update(
        list(estimate.gradient),
        {"G": gradient(estimate, rates.eps)},
        {"decay": rates.decay, "beta": torch.full_like(rates.lr, beta), "step": -rates.lr},
        "momentum",
        {"beta": 1.0, "step": 0.0},
    )


def adam(estimate: Estimate, rates: Rates, betas: tuple[float, float], delta: float, n: Tensor) -> Update:
    """Adam (Kingma and Ba 2015, algorithm 1) on g = sum_k G_k z_k; n [R]: each row's number of updates, with this one.

    m <- b1 m + (1-b1) g, v <- b2 v + (1-b2) g^2, theta <- (1 - lr*wd) theta - lr m^ / (sqrt(v^) + delta), where m^ and v^
    are m / (1-b1^n) and v / (1-b2^n). The pass has the same with sqrt(1-b2^n) multiplied through.
    """
    b1, b2 = betas
    first, second = 1.0 - b1**n, (1.0 - b2**n).sqrt()
    return Update(
        list(estimate.gradient),
        {"G": (1.0 - b1) * gradient(estimate, rates.eps)},
        {
            "decay": rates.decay,
            "beta1": torch.full_like(rates.lr, b1),
            "beta2": torch.full_like(rates.lr, b2),
            "ratio": torch.full_like(rates.lr, (1.0 - b2) / (1.0 - b1) ** 2),
            "step": -rates.lr * second / first,
            "delta": delta * second,
        },
        "adam",
        {"beta1": 1.0, "beta2": 1.0, "ratio": 0.0, "step": 0.0},
    )
