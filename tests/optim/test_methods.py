"""Every method against its float64 oracle (oracles.py), and what holds for all: groups, schedulers, counts, layers."""

from __future__ import annotations

import itertools
import math
import warnings

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
    PLACEMENTS,
    SEED,
    VARIANTS,
    assert_close,
    assert_close_states,
    assert_same_states,
    build,
    dropped_tensors,
    equal,
    expected_of,
    given,
    params_of,
    play,
    relative_error,
    scripted,
    state_of,
    states,
    weights,
)
from tests.models import filled, small, tokens
from tests.oracles import Group, Theta

ON_DEVICE = ["cpu"] + ["cuda"] * torch.cuda.is_available()


# --------------------------------------------------------------------------------------------------- against the oracle


@CASES
@PLACEMENTS
@pytest.mark.parametrize("device", ON_DEVICE)
def test_five_steps_with_given_losses(case, placement, device):
    model = small(device=device)
    start = oracles.theta_of(model)
    opt = build(case, model, placement=placement, weight_decay=0.2)
    expected = expected_of(case, start, [Group(list(start), case.lr, EPS, 0.2)])
    for t in range(5):
        loss = opt.step(scripted(given(case, t)))
        want = expected.step(scripted(given(case, t)))
        assert loss.item() == pytest.approx(want, rel=1e-6)
        assert opt.metrics["loss"].item() == pytest.approx(want, rel=1e-6)
        assert math.isfinite(opt.metrics["projected_gradient"].item())
    assert_close(model, expected.theta, start, 5 * case.passes)
    assert_close_states(case, opt, model, expected)


@CASES
@PLACEMENTS
def test_five_steps_with_real_losses(case, placement):
    model, exact = small(), small(torch.float64)
    start = oracles.theta_of(model)
    opt = build(case, model, placement=placement)
    expected = expected_of(case, start)
    sign = -1.0 if case.climbs else 1.0

    def exact_loss(theta: Theta) -> float:
        oracles.load(exact, theta)
        with torch.no_grad():
            return sign * float(exact(batch))

    for t in range(5):
        batch = tokens(t)
        loss = opt.step(lambda batch=batch: sign * model(batch))
        assert loss.item() == pytest.approx(expected.step(exact_loss), rel=1e-5)
    # The forwards are float32, so a loss is off by some 3e-7. At eps 0.05 that is 1e-5 of the projected gradients and of
    # the spread of the candidates, and 1e-4 of the curvatures, which differ from their old values by a hundredth.
    assert relative_error(oracles.theta_of(model), expected.theta, start) < 2e-3
    for i, p in enumerate(model.parameters()):
        for name, value in expected.state.get(i, {}).items():
            if name == "step":  # the optimizer counts by block
                continue
            mine = state_of(opt, p)[name].double().numpy()
            assert np.linalg.norm(mine - value) <= 2e-3 * np.linalg.norm(value), f"{name} of tensor {i}"


@CASES
@PLACEMENTS
def test_groups_have_their_own_settings(case, placement):
    """lr, eps and weight decay of each group, in the probes and in the update."""
    model = small()
    every, start = params_of(model), oracles.theta_of(model)
    split = [list(range(5)), list(range(5, len(every)))]
    groups = [Group(split[0], case.lr, EPS, 0.5), Group(split[1], 3 * case.lr, 2 * EPS, 0.0)]
    ours = [
        {"params": [every[i] for i in g.ids], "lr": g.lr, "eps": g.eps, "weight_decay": g.weight_decay} for g in groups
    ]
    if placement == "inplace":
        opt = build(case, ours, placement=placement)
    else:  # which needs the module
        opt = build(case, model, placement=placement)
        opt.param_groups = ours
    expected = expected_of(case, start, groups)
    for t in range(4):
        seen: list[Theta] = []
        wanted: list[Theta] = []
        mine, theirs = scripted(given(case, t)), scripted(given(case, t))
        opt.step(lambda seen=seen, mine=mine: (seen.append(oracles.theta_of(model)), mine())[1])
        expected.step(lambda theta, wanted=wanted, theirs=theirs: (wanted.append(theta), theirs())[1])
        assert len(seen) == len(wanted) == case.forwards
        for got, want in zip(seen, wanted, strict=True):  # each forward sees the perturbed weights it should
            assert all(np.allclose(got[i], want[i], rtol=2e-5, atol=2e-5) for i in want)
    assert_close(model, expected.theta, start, 4 * case.passes, 2 * EPS)


@CASES
def test_schedulers_reach_the_update(case):
    model = small()
    start = oracles.theta_of(model)
    opt = build(case, model, weight_decay=0.3)
    group = Group(list(start), case.lr, EPS, 0.3)
    expected = expected_of(case, start, [group])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where a scheduler steps before the optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0 / (1 + t))
        for t in range(4):
            group.lr = case.lr / (1 + t)
            opt.step(scripted(given(case, t)))
            expected.step(scripted(given(case, t)))
            schedule.step()
    assert_close(model, expected.theta, start, 4 * case.passes)


# ------------------------------------------------------------------------------------------------------------- counting


def test_every_method_has_a_case() -> None:
    assert {case.method for case in METHODS.values()} | set(VARIANTS) == set(zokern.optim.METHODS)
    assert all(issubclass(zokern.optim.METHODS[one], zokern.optim.METHODS[other]) for one, other in VARIANTS.items())


@CASES
@PLACEMENTS
def test_forwards_and_passes_are_counted(case, placement):
    model = small()
    opt = build(case, model, placement=placement)
    calls = []
    for t in range(1, 4):
        values = scripted(given(case, t))
        opt.step(lambda values=values: (calls.append(1), values())[1])
        assert len(calls) == case.forwards * t
        assert opt.counters["steps"] == t
        assert opt.counters["forwards"] == case.forwards * t
        assert opt.counters["passes"] == case.passes * t


@pytest.mark.parametrize(
    ("cls", "forwards", "passes"),
    [
        ("MeZO", 2, 3),
        ("HiZOO", 3, 3),
        ("HELENE", 2, 3),
        ("MeZOGV", 6, 7),
        ("MeZOGreedy", 5, 6),
        ("FZOO", 9, 9),
        ("ES", 30, 31),
    ],
)
def test_default_options_cost_what_the_table_says(cls, forwards, passes):
    """The default numbers of samples, candidates and directions, which most cases above shorten."""
    opt = getattr(zokern, cls)(small(), 1e-3, maximize=cls == "ES")
    values = itertools.count(1)
    opt.step(lambda: 1.0 + 1e-3 * next(values))
    assert (opt.counters["forwards"], opt.counters["passes"]) == (forwards, passes)


# --------------------------------------------------------------------------------------------------------------- layers


@CASES
@PLACEMENTS
def test_dropped_blocks_keep_their_weights_and_states(case, placement):
    model = small()
    with torch.no_grad():
        for p in model.parameters():
            p.flatten()[0] = -0.0  # whose sign any arithmetic would lose
    start, every = oracles.theta_of(model), params_of(model)
    dropped = dropped_tensors(model, 1)
    opt = build(case, model, placement=placement, layers=zokern.RandomBlocks(1), weight_decay=0.4)
    expected = expected_of(case, start, [Group(list(start), case.lr, EPS, 0.4)], dropped=dropped)
    ever = set()
    for t in range(5):
        before, states_before = weights(model), states(opt, model)
        opt.step(scripted(given(case, t)))
        expected.step(scripted(given(case, t)))
        after, states_after = weights(model), states(opt, model)
        out = dropped(t)
        assert len(out) == 5
        for i in out:
            assert torch.equal(before[i].view(torch.int32), after[i].view(torch.int32))
            assert_same_states([states_before[i]], [states_after[i]])
        assert not any(torch.equal(before[i], after[i]) for i in range(len(every)) if i not in out)
        ever |= out
    assert len(ever) == 10  # each of the blocks was left out in some step
    assert_close(model, expected.theta, start, 5 * case.passes)
    assert_close_states(case, opt, model, expected)
    assert opt.counters["passes"] == 5 * case.passes


def test_lezo_takes_the_options_of_mezo():
    case = METHODS["mezo-adam-one-sided"]
    one, two = small(), small()
    a = zokern.LeZO(one, case.lr, num_dropped=1, eps=EPS, seed=SEED, **case.options)
    b = build(case, two, layers=zokern.RandomBlocks(1))
    for opt in (a, b):
        play(case, opt, range(3))
    assert equal(weights(one), weights(two))
    assert_same_states(states(a, one), states(b, two))


@CASES
def test_without_a_learning_rate_states_move_and_weights_keep_their_values(case):
    """As during the first step of a warm-up. Rules with states may turn a negative zero into a positive one."""
    model = small()
    with torch.no_grad():
        for p in model.parameters():
            p.flatten()[0] = -0.0
    before, start = weights(model), oracles.theta_of(model)
    opt = build(case, model, placement="shadow", weight_decay=0.2)
    opt.param_groups[0]["lr"] = 0.0
    expected = expected_of(case, start, [Group(list(start), 0.0, EPS, 0.2)])
    for t in range(2):
        opt.step(scripted(given(case, t)))
        expected.step(scripted(given(case, t)))
    assert equal(before, weights(model))
    assert_close_states(case, opt, model, expected)


@CASES
def test_accumulation_is_the_mean_of_the_micro_batches(case):
    """One perturbation for all of them: forwards grow and passes do not."""
    one, two = small(), small()
    start = oracles.theta_of(one)
    a, b = build(case, one), build(case, two)
    for t in range(2):
        values = iter([x + shift for x in given(case, t) for shift in (-0.25, 0.0, 0.25)])
        a.step(lambda batch, values=values: torch.tensor(next(values), dtype=torch.float64), [0, 1, 2])
        play(case, b, [t])
    assert_close(one, oracles.theta_of(two), start, 2 * case.passes)
    assert a.counters["forwards"] == 3 * b.counters["forwards"]
    assert a.counters["passes"] == b.counters["passes"]


@CASES
@PLACEMENTS
def test_frozen_and_empty_parameters_are_left_alone(case, placement):
    model = nn.ParameterList([filled(7), nn.Parameter(torch.zeros(0, 3)), filled(5), filled(9)])
    model[2].requires_grad_(False)
    opt = build(case, model, placement=placement)
    play(case, opt, range(2))
    assert bool((model[2] == 0.5).all())
    assert bool((model[0] != 0.5).any())
    assert bool((model[3] != 0.5).any())
    assert [set(state_of(opt, p)) for p in model] == [set(case.states), set(), set(), set(case.states)]
