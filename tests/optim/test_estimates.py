"""What a step estimates: the gradient of a quadratic in the mean, and a descent that learns least squares."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.methods import (
    CASES,
    build,
)


def quadratic(d: int) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor]:
    """A point, x'Ax/2 - b'x, and the gradient there."""
    g = torch.Generator().manual_seed(4)
    root = torch.randn(d, d, generator=g, dtype=torch.float64) / math.sqrt(d)
    a, b = root @ root.T, torch.randn(d, generator=g, dtype=torch.float64)
    x0 = torch.randn(d, generator=g)

    def loss(x: Tensor) -> Tensor:
        return x.double() @ a @ x.double() / 2 - b @ x.double()

    return x0, loss, a @ x0.double() - b


UNBIASED: dict[str, tuple[str, dict[str, Any]]] = {
    # Left out, because they are biased by design: the other updates of MeZO (they are not linear in the estimate),
    # MeZO-GV and MeZO-Greedy (they choose directions by the loss), FZOO and ES (they divide by the spread, or rank).
    "one-sided": ("MeZO", {"one_sided": True}),
    "one-sided-signs": ("MeZO", {"one_sided": True, "distribution": "rademacher"}),
    "one-sided-4": ("MeZO", {"one_sided": True, "num_samples": 4}),
    "two-sided": ("MeZO", {}),
    "momentum": ("MeZO", {"update": "momentum", "betas": (0.0, 0.999)}),
    "hizoo": ("HiZOO", {"smoothing": 0.0}),
    "hizoo-2": ("HiZOO", {"smoothing": 0.0, "num_samples": 2}),
    "helene": ("HELENE", {"betas": (0.0, 0.0), "anneal_steps": 1e12, "floor": 1e9, "gamma": 1e-9, "delta": 0.0}),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_estimator_is_unbiased_on_a_quadratic(name):
    """The mean update is the gradient; with HiZOO's h, which is set by hand here, the gradient over h."""
    cls, options = UNBIASED[name]
    d, steps = 16, 1200 // options.get("num_samples", 1)
    x0, loss, gradient = quadratic(d)
    x = nn.Parameter(x0.clone())
    opt = getattr(zokern, cls)([x], 1.0, eps=1e-2, seed=77, placement="inplace", **options)
    want = gradient
    if cls == "HiZOO":
        opt.step(lambda: loss(x))  # makes h
        h = torch.linspace(0.5, 3.0, d)
        opt.state[x]["h"].copy_(h)
        x.data.copy_(x0)
        want = gradient / h.double()
    estimates = torch.empty(steps, d, dtype=torch.float64)
    for i in range(steps):
        opt.step(lambda: loss(x))
        estimates[i] = x0.double() - x.detach().double()
        x.data.copy_(x0)
    z = (estimates.mean(0) - want) / (estimates.var(0) / steps).sqrt()
    assert z.abs().max() < 4.0  # 16 of them: P(fail) 0.1 % if the seed were free
    assert 0.3 < z.square().mean() < 2.2


@CASES
def test_learns_least_squares(case):
    """Each method, with its own lr, gets most of the way to the optimum from where it is known to start."""
    g = torch.Generator().manual_seed(5)
    inputs = torch.randn(24, 5, generator=g)
    targets = inputs @ torch.randn(5, 1, generator=g) + 1.0 + 0.1 * torch.randn(24, 1, generator=g)
    model = nn.Linear(5, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    ones = torch.cat([inputs, torch.ones(24, 1)], 1)
    best = (ones @ torch.linalg.lstsq(ones, targets).solution - targets).square().mean().item()

    def loss() -> Tensor:
        return (model(inputs) - targets).double().square().mean()

    start = loss().item()
    opt = build(case, model)
    opt.param_groups[0]["lr"] = case.rate
    for _ in range(150):
        opt.step((lambda: -loss()) if case.climbs else loss)
    assert loss().item() - best < 0.2 * (start - best)
