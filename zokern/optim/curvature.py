"""HiZOO's diagonal curvature as a part that methods share: scaled probes, and the pass that updates h with the weights.

kappa = |L+ + L- - 2 L0| / (2 eps^2);  h' = (1 - a) h + a kappa h z^2;  theta <- ... - lr c z / sqrt(h')
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zokern.kinds import DType
from zokern.optim import state
from zokern.optim.update import Estimate, Rates, gradient, stacked
from zokern.passes.update import Update
from zokern.settings import setting

DTYPES = DType((torch.float32, torch.bfloat16))
CURVATURE_DTYPE: Any = setting(
    default=torch.float32,
    kind=DTYPES,
    help="Storage of the curvature h. bfloat16 is rounded stochastically: half the memory, and h still moves on "
    "average by what it should.",
)


def states(dtype: torch.dtype) -> state.Spec:
    """h, which starts at 1."""
    return {"h": (dtype, 1.0)}


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
