"""HiZOO's diagonal curvature as a part that methods share: scaled probes, and the pass that updates h with the weights.

kappa = |L+ + L- - 2 L0| / (2 eps^2);  h' = (1 - a) h + a kappa h z^2;  theta <- ... - lr c z / sqrt(h')
"""

from __future__ import annotations

import torch
from torch import Tensor

from zokern import _checks
from zokern.optim import state
from zokern.optim.update import Estimate, Rates, gradient, stacked
from zokern.passes.update import Update

DTYPES = (torch.float32, torch.bfloat16)


def check(smoothing: object, dtype: object) -> tuple[float, state.Spec]:
    """The smoothing a, and the state h: it starts at 1."""
    share = _checks.check_share(smoothing, "smoothing")
    if dtype not in DTYPES:
        raise ValueError(f"curvature_dtype is {dtype}; it must be torch.float32 or torch.bfloat16")
    assert isinstance(dtype, torch.dtype)
    return share, {"h": (dtype, 1.0)}


def second_difference(plus: Tensor, minus: Tensor, here: Tensor) -> Tensor:
    """kappa in units of 1/eps^2."""
    return (plus + minus - 2.0 * here).abs() / 2.0


def update(estimate: Estimate, rates: Rates, smoothing: float) -> Update:
    """The pass: curvature and weights in one sweep, the weights with the new curvature."""
    kappa = stacked(estimate.curvature)
    if estimate.square_of_sum:  # kappa are the square roots of the coefficients
        coefs = smoothing**0.5 * kappa / rates.eps[:, None]
    else:
        coefs = smoothing * kappa / rates.eps[:, None] ** 2
    return Update(
        list(estimate.gradient),
        {"G": -rates.lr[:, None] * gradient(estimate, rates.eps), "V": coefs},
        {"decay": rates.decay, "smoothing": torch.full_like(rates.lr, smoothing)},
        "hizoo",
        {"smoothing": 0.0},
        square_of_sum=estimate.square_of_sum,
    )
