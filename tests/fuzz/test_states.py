"""A state_dict that says what none says is refused by its name, and nothing is changed; or it is loaded, and goes on."""

from __future__ import annotations

import copy
import random
import time
from typing import Any

import numpy as np
import pytest
import torch

from tests.fuzz import records, targets
from zokern.optim.loading import same

INPUTS, SECONDS = 400, 15.0
HOSTILE: list[Any] = [
    *records.HOSTILE, torch.zeros(0), torch.tensor(1.0), torch.zeros(33), torch.full((5,), torch.nan), torch.int32, b"x",
    torch.zeros(33, dtype=torch.bfloat16), torch.zeros(5, 5), (1, 2), {1: 2}, {2}, [torch.zeros(2), 0.5],
]  # fmt: skip


def saved(name: str) -> dict[str, Any]:
    run = targets.begin(targets.CASES[name])
    for _ in range(3):
        run.made.step(run.loss)
    return copy.deepcopy(run.made.state_dict())


def load(name: str, state: dict[str, Any], *, later: bool) -> bool:
    """Whether it is taken, by an optimizer of this case; later: one that has done a step."""
    run = targets.begin(targets.CASES[name])
    if later:
        run.made.step(run.loss)
    before = copy.deepcopy(run.made.state_dict())
    try:
        run.made.load_state_dict(state)
    except (TypeError, ValueError) as error:
        if "state_dict" not in str(error):
            raise
        assert same(run.made.state_dict(), before)
        return False
    targets.step(run)
    return True


@pytest.mark.filterwarnings("ignore::zokern.ZokernWarning")  # of a lr that is none
def test_changed_states_are_refused_or_loaded() -> None:
    states = {name: saved(name) for name in targets.CASES}
    rng, tried, taken, begun = random.Random(20261130), 0, 0, time.monotonic()
    while tried < INPUTS and (tried < 30 or time.monotonic() - begun < SECONDS):
        name = rng.choice(list(states))
        state = copy.deepcopy(states[name])
        for _ in range(rng.randint(1, 2)):
            records.change(state, rng, HOSTILE)
        taken += load(name, state, later=rng.random() < 0.5)
        tried += 1
    assert tried / 20 < taken < tried / 2


ITSELF: list[Any] = [0.9]
ITSELF.append(ITSELF)


@pytest.mark.parametrize(
    "value",
    [torch.zeros(2), [0.9, torch.zeros(2)], [0.9, (torch.zeros(0),)], np.zeros(2), [0.9, np.zeros(2)], ITSELF],
)
def test_a_tensor_is_no_setting(value: Any) -> None:
    """Nor what cannot be compared with one."""
    state = saved("adam")
    state["zokern"]["options"]["betas"] = value
    assert not load("adam", state, later=True)


def test_an_unchanged_state_is_loaded() -> None:
    assert all(load(name, saved(name), later=later) for name in targets.CASES for later in (False, True))
