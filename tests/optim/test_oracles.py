"""The oracles (tests/oracles.py) against each other, where two methods should coincide, and against torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests import oracles
from tests.methods import (
    SEED,
)
from tests.oracles import Group, Theta


def bowl() -> tuple[Theta, list[Group], Callable[[Theta], float]]:
    """A smooth function of two tensors in groups with settings of their own."""
    g = np.random.default_rng(3)
    root, b = g.standard_normal((27, 27)), g.standard_normal(27)
    a = root @ root.T / 27

    def loss(theta: Theta) -> float:
        x = np.concatenate([theta[0].ravel(), theta[1]])
        return float(x @ a @ x / 2 - b @ x + 0.1 * np.sin(x).sum())

    groups = [Group([0], 0.02, 0.05, 0.3), Group([1], 0.03, 0.1, 0.0)]
    return {0: g.standard_normal((4, 5)), 1: g.standard_normal(7)}, groups, loss


@pytest.mark.parametrize("num_samples", [1, 3])
def test_oracles_that_should_coincide_with_mezo_do(num_samples):
    theta, groups, loss = bowl()
    options: dict[str, Any] = {"seed": SEED, "num_samples": num_samples}
    mezo = oracles.MeZO(theta, groups, **options)
    others = [
        oracles.MeZO(theta, groups, update="momentum", betas=(0.0, 0.0), **options),
        oracles.HiZOO(theta, groups, smoothing=0.0, **options),
        oracles.HELENE(theta, groups, betas=(0.0, 0.0), anneal_steps=1e15, delta=0.0, floor=lambda i: 1e6, **options),
    ]
    others[-1].gamma = 1e-6
    for _ in range(4):
        for o in (mezo, *others):
            o.step(loss)
    for o in others:
        assert all(np.allclose(o.theta[i], mezo.theta[i], rtol=0, atol=1e-12) for i in theta)


def test_oracle_of_adam_is_torch_adamw_on_the_estimate():
    theta, groups, loss = bowl()
    adam = oracles.MeZO(theta, groups, seed=SEED, num_samples=2, update="adam")
    estimate = oracles.MeZO(theta, [Group([0], 1.0, 0.05), Group([1], 1.0, 0.1)], seed=SEED, num_samples=2)
    ours = {i: nn.Parameter(torch.from_numpy(t.copy())) for i, t in theta.items()}
    settings = [{"params": [ours[g.ids[0]]], "lr": g.lr, "weight_decay": g.weight_decay} for g in groups]
    adamw = torch.optim.AdamW(settings, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(4):
        estimate.theta = before = adam.theta
        estimate.step(loss)
        for i, p in ours.items():
            p.grad = torch.from_numpy(before[i] - estimate.theta[i])
        adamw.step()
        adam.step(loss)
    for i, p in ours.items():
        assert np.allclose(p.detach().numpy(), adam.theta[i], rtol=0, atol=1e-10)


def test_oracle_of_adamezo_is_adam_without_correction_while_its_horizon_lasts():
    """And delta is under the root. Beyond the horizon they part."""
    theta, groups, loss = bowl()
    adamezo = oracles.MeZO(theta, groups, seed=SEED, update="adamezo", horizon=4)
    estimate = oracles.MeZO(theta, [Group([0], 1.0, 0.05), Group([1], 1.0, 0.1)], seed=SEED)
    m, v = ({i: np.zeros_like(t) for i, t in theta.items()} for _ in range(2))
    for t in range(6):
        estimate.theta = before = adamezo.theta
        estimate.step(loss)
        adamezo.step(loss)
        for group in groups:
            i = group.ids[0]
            g = before[i] - estimate.theta[i]
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
            want = (1 - group.lr * group.weight_decay) * before[i] - group.lr * m[i] / np.sqrt(v[i] + 1e-8)
            assert np.allclose(adamezo.theta[i], want, rtol=0, atol=1e-10) == (t < 4)
