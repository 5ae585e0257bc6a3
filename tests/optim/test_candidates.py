"""Methods that compare losses: MeZO-GV, MeZO-Greedy, FZOO and ES, where losses are equal, tied or shifted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import zokern
from tests import oracles
from tests.methods import (
    CASES,
    EPS,
    METHODS,
    SEED,
    assert_close,
    build,
    equal,
    expected_of,
    given,
    scripted,
    weights,
)
from tests.models import filled, small
from tests.oracles import Theta
from zokern.contract import reference


def test_gv_is_not_noise_that_was_never_evaluated():
    """v is the mean of the best minus the mean of the rest, of the very directions whose losses were taken."""
    model = small()
    start = oracles.theta_of(model)
    opt = zokern.MeZOGV(model, 1.0, eps=EPS, seed=SEED, candidates=4, placement="shadow")
    seen: list[Theta] = []
    values = iter([3.0, 1.0, 4.0, 2.0, 1.0, 1.0])
    opt.step(lambda: (seen.append(oracles.theta_of(model)), next(values))[1])
    for i, w in start.items():
        z = [(seen[j][i] - w) / EPS for j in range(4)]
        v = (z[1] + z[3]) / 2 - (z[0] + z[2]) / 2
        assert np.allclose(seen[4][i], w + EPS * v, atol=2e-6)
        assert np.allclose(seen[5][i], w - EPS * v, atol=2e-6)


@pytest.mark.parametrize(("name", "equal_losses"), [("gv", [1.0, 0.5, 0.5, 1.0]), ("greedy", [1.0, 0.5, 0.5, 0.5])])
def test_candidates_of_equal_loss_keep_their_order(name, equal_losses):
    case = METHODS[name]
    model = small()
    start = oracles.theta_of(model)
    opt, expected = build(case, model), expected_of(case, start)
    for values in ([*equal_losses, 1.0, 0.9], [2.0, 2.0, 2.0, 2.0, 1.0, 0.9]):
        opt.step(scripted(values))
        expected.step(scripted(values))
    assert_close(model, expected.theta, start, 2 * case.passes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("candidates", [3, 6, 7])
@pytest.mark.parametrize("value", [1.0, 0.1, 1e-3])
def test_fzoo_with_no_spread_only_decays(candidates, value, dtype):
    """The mean of three times 0.1 is not 0.1: a spread of 1e-17 is none, or the weights are gone."""
    model = small(dtype)
    before = weights(model)
    opt = zokern.FZOO(model, 0.1, eps=EPS, seed=SEED, candidates=candidates, placement="shadow", rounding="nearest")
    opt.step(scripted([0.3] + [value] * candidates))
    assert equal(weights(model), before)
    opt.param_groups[0]["weight_decay"] = 2.5
    opt.step(scripted([0.3] + [value] * candidates))
    for a, b in zip(weights(model), before, strict=True):
        assert torch.allclose(a.float(), 0.75 * b.float(), rtol=1e-6 if dtype == torch.float32 else 2.0**-8)
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("shaping", ["standardised", "ranked"])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("value", [1.0, 0.1])
def test_es_with_equal_rewards_only_decays(shaping, antithetic, value):
    model = small()
    before = weights(model)
    opt = zokern.ES(
        model, 0.1, eps=EPS, seed=SEED, maximize=True,
        num_directions=3, shaping=shaping, antithetic=antithetic, placement="shadow",
    )  # fmt: skip
    opt.step(lambda: value)
    assert equal(weights(model), before)
    opt.param_groups[0]["weight_decay"] = 2.5
    opt.step(lambda: value)
    assert all(torch.allclose(a, 0.75 * b, rtol=1e-6) for a, b in zip(weights(model), before, strict=True))
    assert opt.skipped_steps == 0


@pytest.mark.parametrize(
    ("antithetic", "rewards", "shaped"),
    [
        (False, [5.0, 1.0, 5.0, 2.0], [2.5 / 3 - 0.5, -0.5, 2.5 / 3 - 0.5, 1 / 3 - 0.5]),
        (False, [-1e9, 7.0, 7.0, 7.0], [-0.5, 2 / 3 - 0.5, 2 / 3 - 0.5, 2 / 3 - 0.5]),
        (True, [1.0, 3.0, 3.0, 3.0, 0.0, 9.0], [0.2 - 0.6, 0.0, 0.0 - 1.0]),
    ],
)
def test_es_ranks_with_ties(antithetic, rewards, shaped):
    """Equal rewards get the mean of their ranks; by hand, not by the oracle."""
    n = len(shaped)
    model = nn.ParameterList([filled(60)])
    opt = zokern.ES(
        model, 0.01, eps=EPS, seed=SEED, maximize=True,
        num_directions=n, shaping="ranked", antithetic=antithetic, placement="shadow",
    )  # fmt: skip
    opt.step(scripted(rewards))
    z = [reference.noise(60, reference.derive_seed(SEED, 0, k), 0).astype(np.float64) for k in range(n)]
    scale = 0.01 / (2 * n * EPS) if antithetic else 0.01 / (n * EPS)
    want = 0.5 + scale * sum(r * d for r, d in zip(shaped, z, strict=True))
    assert np.allclose(model[0].detach().double().numpy(), want, atol=5e-7)
    assert opt.metrics["loss"].item() == pytest.approx(np.mean(rewards), rel=1e-6)


@CASES
def test_shifted_losses_give_the_same_step(case):
    """Only differences count, in whatever way a method uses them."""
    results = []
    for shift in (0.0, 64.0):
        model = small()
        opt = build(case, model)
        for t in range(2):
            opt.step(scripted([x + shift for x in given(case, t)]))
        results.append(weights(model))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*results, strict=True))
