"""A run that was saved and loaded goes on with the bits of the run that was not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import zokern
from tests import oracles
from tests.methods import (
    CASES,
    METHODS,
    SEED,
    assert_close,
    assert_same_states,
    build,
    equal,
    expected_of,
    given,
    play,
    relative_error,
    saved,
    scripted,
    states,
    weights,
)
from tests.models import small


@CASES
@pytest.mark.parametrize(
    ("placement", "dtype"),
    [("inplace", torch.float32), ("shadow", torch.float32), ("shadow", torch.bfloat16)],
    ids=["inplace-float32", "shadow-float32", "shadow-bfloat16"],
)
def test_continue_equals_the_uninterrupted_run(case, placement, dtype):
    whole = small(dtype)
    opt = build(case, whole, placement=placement, weight_decay=0.2)
    play(case, opt, range(6))

    half = small(dtype)
    first = build(case, half, placement=placement, weight_decay=0.2)
    play(case, first, range(3))
    kept = saved({"model": half.state_dict(), "opt": first.state_dict()})

    again = small(dtype, seed=9)  # other weights, another seed, other hyper-parameters: all come from the state
    again.load_state_dict(kept["model"])
    second = build(case, again, placement=placement, weight_decay=7.0, seed=0, eps=1.0)
    second.load_state_dict(kept["opt"])
    assert_same_states(states(second, again), states(first, half))
    for state in states(second, again):
        # torch itself would cast states to the parameters' type
        assert all(value.dtype == torch.float32 for value in state.values())
    play(case, second, range(3, 6))
    assert equal(weights(again), weights(whole))
    assert not equal(weights(again), weights(half))
    assert_same_states(states(second, again), states(opt, whole))
    assert second.counters == opt.counters


@CASES
def test_continue_with_layers(case):
    """States of blocks that were never active, and the draw of the blocks, survive."""

    def make(seed: int) -> tuple[nn.Module, Any]:
        model = small()
        return model, build(case, model, layers=zokern.RandomBlocks(1), seed=seed)

    whole, opt = make(SEED)
    play(case, opt, range(4))
    half, first = make(SEED)
    play(case, first, range(1))
    kept = saved({"model": half.state_dict(), "opt": first.state_dict()})
    again, second = make(0)
    again.load_state_dict(kept["model"])
    second.load_state_dict(kept["opt"])
    play(case, second, range(1, 4))
    assert equal(weights(again), weights(whole))
    assert_same_states(states(second, again), states(opt, whole))


def test_adamezo_continues_with_its_history():
    """The update after loading is that of the whole past, and far from that of a run which forgot it."""
    case = METHODS["mezo-adamezo"]
    model = small()
    start = oracles.theta_of(model)
    opt, expected = build(case, model), expected_of(case, start)
    play(case, opt, range(4))
    for t in range(4):
        expected.step(scripted(given(case, t)))
    again = small()
    again.load_state_dict(model.state_dict())
    fresh = build(case, again)
    fresh.load_state_dict(saved(opt.state_dict()))
    forgetful = copy.deepcopy(expected)
    forgetful.history = []
    before = expected.theta
    play(case, fresh, [4])
    for o in (expected, forgetful):
        o.step(scripted(given(case, 4)))
    assert_close(again, expected.theta, start, 5 * case.passes)
    assert relative_error(expected.theta, forgetful.theta, before) > 0.1
