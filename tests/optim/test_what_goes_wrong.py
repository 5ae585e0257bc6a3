"""What goes wrong in a step of any method: losses that are not finite, closures that raise, vectors of losses."""

from __future__ import annotations

import math

import pytest
import torch

import zokern
from tests import oracles
from tests.methods import (
    CASES,
    EPS,
    PLACEMENTS,
    assert_close,
    assert_close_states,
    assert_same_states,
    build,
    equal,
    expected_of,
    given,
    play,
    scripted,
    states,
    weights,
)
from tests.models import small
from tests.oracles import Group

# --------------------------------------------------------------------------------------------------- losses not finite


@CASES
@PLACEMENTS
def test_a_loss_that_is_not_finite_skips_the_step(case, placement):
    """Any loss, also that of a candidate which would not have been chosen; the step after it is as if nothing had been."""
    for position in range(case.forwards):
        model = small()
        start = oracles.theta_of(model)
        opt = build(case, model, placement=placement, weight_decay=0.2)
        expected = expected_of(case, start, [Group(list(start), case.lr, EPS, 0.2)])
        play(case, opt, [0])
        expected.step(scripted(given(case, 0)))
        before, states_before = weights(model), states(opt, model)

        values = given(case, 1)
        values[position] = (math.nan, math.inf, -math.inf)[position % 3]
        with pytest.warns(zokern.ZokernWarning, match="not finite"):
            loss = opt.step(scripted(values))
        assert not math.isfinite(loss.item())
        expected.step(scripted(values))
        after = weights(model)
        if placement == "shadow":
            assert equal(before, after)
        else:  # restored: each pass rounds
            assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(before, after, strict=True))
        assert_same_states(states_before, states(opt, model))
        assert opt.skipped_steps == 1
        assert opt.counters["steps"] == 2

        play(case, opt, [2])
        expected.step(scripted(given(case, 2)))
        assert opt.skipped_steps == 1
        assert_close(model, expected.theta, start, 3 * case.passes)
        assert_close_states(case, opt, model, expected)


@CASES
def test_a_first_step_that_is_skipped(case):
    """States need not exist afterwards; where they do, they are the initial ones."""
    model = small()
    start = oracles.theta_of(model)
    opt = build(case, model, placement="shadow", weight_decay=0.2)
    expected = expected_of(case, start, [Group(list(start), case.lr, EPS, 0.2)])
    before = weights(model)
    with pytest.warns(zokern.ZokernWarning, match="not finite"):
        opt.step(scripted([math.nan] * case.forwards))
    expected.step(scripted([math.nan] * case.forwards))
    assert equal(before, weights(model))
    for state in states(opt, model):
        for name, value in state.items():
            initial = 1.0 if name == "h" and case.method != "helene" else 0.0
            assert bool((value == initial).all()), name
    for t in (1, 2):
        opt.step(scripted(given(case, t)))
        expected.step(scripted(given(case, t)))
    assert_close(model, expected.theta, start, 2 * case.passes)
    assert_close_states(case, opt, model, expected)


def test_a_vector_with_one_bad_example_skips_the_step():
    model = small()
    before = weights(model)
    opt = zokern.HELENE(model, 1e-2, placement="shadow")
    values = scripted([[1.0, 2.0, 3.0], [1.0, math.inf, 3.0]])
    with pytest.warns(zokern.ZokernWarning, match="not finite"):
        opt.step(values)
    assert equal(before, weights(model))
    assert opt.skipped_steps == 1


# ------------------------------------------------------------------------------------------- what else holds for them all


@CASES
@PLACEMENTS
def test_an_exception_in_the_closure_changes_nothing(case, placement):
    for position in (0, case.forwards // 2, case.forwards - 1):
        model = small()
        opt = build(case, model, placement=placement)
        play(case, opt, [0])
        before, states_before = weights(model), states(opt, model)
        values = iter(given(case, 1)[:position])
        with pytest.raises(ZeroDivisionError):
            opt.step(lambda values=values: next(values, None) or 1 / 0)
        after = weights(model)
        if placement == "shadow":
            assert equal(before, after)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(before, after, strict=True))
        assert_same_states(states_before, states(opt, model))
        assert opt.counters["steps"] == 1
