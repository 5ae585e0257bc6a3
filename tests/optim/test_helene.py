"""HELENE: losses of examples, the curvature's interval, and its floors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import zokern
from tests import oracles
from tests.methods import (
    EPS,
    METHODS,
    PLACEMENTS,
    SEED,
    assert_close,
    assert_close_states,
    equal,
    given,
    params_of,
    play,
    scripted,
    states,
    weights,
)
from tests.models import small
from tests.oracles import Group


def per_example(step: int, examples: int) -> list[list[float]]:
    return (1.0 + 0.1 * np.random.default_rng([8, step]).standard_normal((4, examples))).tolist()


@PLACEMENTS
def test_helene_takes_losses_of_examples(placement):
    """s is the mean of the squares, which is not the square of the mean."""
    options = {"num_samples": 2, "betas": (0.9, 0.8), "hessian_interval": 2}
    model = small()
    start = oracles.theta_of(model)
    opt = zokern.HELENE(model, 1e-2, eps=EPS, seed=SEED, floor=0.1, placement=placement, **options)
    expected = oracles.HELENE(start, [Group(list(start), 1e-2, EPS)], seed=SEED, floor=lambda i: 0.1, **options)
    for t in range(5):
        values = per_example(t, 6)
        loss = opt.step(scripted(values))
        want = expected.step(scripted(values))
        assert loss.shape == ()
        assert loss.item() == pytest.approx(want, rel=1e-6)
    assert_close(model, expected.theta, start, 25)
    assert_close_states(METHODS["helene"], opt, model, expected)
    assert opt.counters["forwards"] == 20


def test_helene_with_one_example_or_equal_ones_is_the_scalar_form():
    results = []
    for form in ("scalar", "one", "equal"):
        model = small()
        opt = zokern.HELENE(model, 1e-2, eps=EPS, seed=SEED, floor=0.1, hessian_interval=1)
        for t in range(3):
            values = given(METHODS["helene"], t)
            opt.step(scripted(values if form == "scalar" else [[v] * (1 if form == "one" else 4) for v in values]))
        results.append(weights(model))
    for other in results[1:]:
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(results[0], other, strict=True))


def test_helene_curvature_moves_on_its_steps_only():
    model = small()
    opt = zokern.HELENE(model, 1e-2, eps=EPS, seed=SEED, hessian_interval=3)
    case = METHODS["helene"]
    play(case, opt, [0])
    assert all(bool((state["h"] > 0).any()) for state in states(opt, model))
    for t in range(1, 8):
        before = states(opt, model)
        play(case, opt, [t])
        after = states(opt, model)
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old["h"], new["h"]) == (t % 3 != 0)
            assert not torch.equal(old["m"], new["m"])


def test_helene_floors_one_for_each_parameter():
    """A list follows the order of the parameter groups, without those that do not train."""
    model = small()
    model.layers[0].norm.requires_grad_(False)
    start = oracles.theta_of(model)
    ids = [i for i, p in enumerate(model.parameters()) if p.requires_grad]
    floors = [0.05 * (k + 1) for k in range(len(ids))]
    by_id = dict(zip(ids, floors, strict=True))
    opt = zokern.HELENE(model, 5e-3, eps=EPS, seed=SEED, betas=(0.9, 0.8), hessian_interval=1, floor=floors)
    expected = oracles.HELENE(
        start, [Group(ids, 5e-3, EPS)], seed=SEED, betas=(0.9, 0.8), hessian_interval=1, floor=by_id.__getitem__
    )
    for t in range(3):
        opt.step(scripted(given(METHODS["helene"], t)))
        expected.step(scripted(given(METHODS["helene"], t)))
    assert_close(model, expected.theta, start, 9)
    assert any((expected.state[i]["h"] > by_id[i]).any() for i in ids)  # some curvatures are above their floor
    assert any((expected.state[i]["h"] < by_id[i]).any() for i in ids)  # and some below

    one, two = small(), small()
    results = []
    for m, floor in ((one, 0.2), (two, [0.2] * len(params_of(two)))):
        opt = zokern.HELENE(m, 5e-3, eps=EPS, seed=SEED, floor=floor)
        play(METHODS["helene"], opt, range(2))
        results.append(weights(m))
    assert equal(*results)


def test_helene_floor_by_layer_falls_with_the_size():
    one, two = small(), small()
    sizes = [p.numel() for p in one.parameters()]
    results = []
    for model, floor in ((one, zokern.ByLayer(0.7)), (two, [0.7 / math.sqrt(n) for n in sizes])):
        opt = zokern.HELENE(model, 5e-3, eps=EPS, seed=SEED, floor=floor)
        play(METHODS["helene"], opt, range(2))
        results.append(weights(model))
    assert equal(*results)
