"""HiZOO's curvature: how far it moves, what it scales, and that of bfloat16, which two other methods may use."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import zokern
from tests import oracles
from tests.methods import (
    CURVED,
    EPS,
    METHODS,
    SEED,
    assert_close,
    assert_same_states,
    build,
    equal,
    given,
    play,
    saved,
    scripted,
    states,
    weights,
)
from tests.models import filled, small
from zokern.contract import reference


def curvature_losses(kappa: float, eps: float, c: float = 1.0) -> list[float]:
    """L0, L+ and L- of this curvature and this projected gradient."""
    return [1.0, 1.0 + kappa * eps**2 + c * eps, 1.0 + kappa * eps**2 - c * eps]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kappa", [1000.0, -1000.0])
def test_curvature_moves_at_the_published_smoothing(dtype, kappa):
    """a = 1e-8 in the weights' own type would leave h at 1 for ever, in float32 as well for kappa near 1."""
    model = nn.ParameterList([filled(200, dtype)])
    opt = zokern.HiZOO(model, 1e-3, eps=0.1, seed=SEED, smoothing=1e-8)
    want = np.ones(200)
    for t in range(3):
        z = reference.noise(200, reference.derive_seed(SEED, t, 0), 0).astype(np.float64)
        opt.step(scripted(curvature_losses(kappa, 0.1)))
        want *= 1.0 - 1e-8 + 1e-8 * abs(kappa) * z**2
    h = opt.state[model[0]]["h"]
    assert h.dtype == torch.float32
    moved = h.double().numpy() - 1.0
    assert np.median(moved) > 50 * 2.0**-23
    assert abs(moved - (want - 1.0)).max() < 3 * 1.5 * 2.0**-23 + 1e-5 * (want - 1.0).max()


def test_no_smoothing_leaves_the_curvature_and_is_mezo():
    one, two = small(), small()
    a = zokern.HiZOO(one, 1e-2, eps=EPS, seed=SEED, smoothing=0.0)
    b = zokern.MeZO(two, 1e-2, eps=EPS, seed=SEED)
    start = oracles.theta_of(one)
    for t in range(3):
        values = given(METHODS["hizoo"], t)
        a.step(scripted(values))
        b.step(scripted(values[1:]))
    assert all(bool((state["h"] == 1.0).all()) for state in states(a, one))
    assert_close(one, oracles.theta_of(two), start, 9)


def test_update_uses_the_new_curvature_and_the_probe_the_old():
    """One step from a known h: both are visible, in the weights during the forwards and after the step."""
    model = nn.ParameterList([filled(50)])
    opt = zokern.HiZOO(model, 0.1, eps=0.1, seed=SEED, smoothing=0.5, placement="shadow")
    opt.step(scripted([1.0, 1.0, 1.0]))
    opt.state[model[0]]["h"].copy_(torch.linspace(0.25, 9.0, 50))
    before, h = model[0].detach().double().clone(), torch.linspace(0.25, 9.0, 50).double()
    seen = []
    values = scripted(curvature_losses(4.0, 0.1, 2.0))
    opt.step(lambda: (seen.append(model[0].detach().double().clone()), values())[1])
    z = torch.from_numpy(reference.noise(50, reference.derive_seed(SEED, 1, 0), 0)).double()
    new = 0.5 * h + 0.5 * h * 4.0 * z**2
    assert torch.allclose(seen[0], before, rtol=0, atol=0)
    assert torch.allclose(seen[1], before + 0.1 * z / h.sqrt(), atol=1e-6)
    assert torch.allclose(seen[2], before - 0.1 * z / h.sqrt(), atol=1e-6)
    assert torch.allclose(opt.state[model[0]]["h"].double(), new, rtol=1e-5)
    assert torch.allclose(model[0].detach().double(), before - 0.1 * 2.0 * z / new.sqrt(), atol=1e-6)


@pytest.mark.parametrize(("start", "kappa", "limit"), [(2.0**63, 1e6, 2.0**64), (2.0**-64, 0.0, 2.0**-64)])
def test_curvature_stays_within_its_limits(start, kappa, limit):
    model = nn.ParameterList([filled(50)])
    opt = zokern.HiZOO(model, 1e-3, eps=1.0, seed=SEED, smoothing=0.5, distribution="rademacher", placement="shadow")
    opt.step(scripted([1.0, 1.0, 1.0]))
    opt.state[model[0]]["h"].fill_(start)
    opt.step(scripted(curvature_losses(kappa, 1.0)))
    assert bool((opt.state[model[0]]["h"] == limit).all())
    assert bool(model[0].isfinite().all())


def test_curvature_in_bf16_moves_by_the_right_amount_on_average():
    """Steps of a hundredth of a bf16 ulp: lost when rounded to nearest, right in the mean when rounded stochastically."""
    n, steps, rate = 8192, 50, 1e-4
    model = nn.ParameterList([filled(n)])
    opt = zokern.HiZOO(
        model,
        1e-3,
        eps=0.1,
        seed=SEED,
        smoothing=1e-3,
        distribution="rademacher",  # z^2 is 1: every element is expected to grow alike
        curvature_dtype=torch.bfloat16,
    )
    for _ in range(steps):
        opt.step(scripted(curvature_losses(1.0 + rate / 1e-3, 0.1)))
    h = opt.state[model[0]]["h"]
    assert h.dtype == torch.bfloat16
    ulp = 2.0**-7
    deviation = math.sqrt(steps * rate * ulp)  # of an element: `steps` draws of one ulp, each with P = rate / ulp
    assert h.double().mean().item() == pytest.approx((1 + rate) ** steps, abs=4 * deviation / math.sqrt(n))
    assert set(h.double().unique().tolist()) <= {1.0 + k * ulp for k in range(9)}


@CURVED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bf16_curvature_survives_saving(name, dtype):
    """torch would cast it to the weights' type; the rounding of h goes on with the same bits."""
    case = METHODS[name]
    options = {"curvature_dtype": torch.bfloat16, "smoothing": 0.1, "placement": "shadow"}
    whole, half = small(dtype), small(dtype)
    opt, first = build(case, whole, **options), build(case, half, **options)
    play(case, opt, range(4))
    play(case, first, range(2))
    second = build(case, half, **options)
    second.load_state_dict(saved(first.state_dict()))
    assert_same_states(states(second, half), states(first, half))
    play(case, second, range(2, 4))
    assert equal(weights(half), weights(whole))
    assert_same_states(states(second, half), states(opt, whole))
    assert all(state["h"].dtype == torch.bfloat16 for state in states(second, half))
