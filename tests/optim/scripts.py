"""Losses for MeZO to be given, and how far its weights may be from the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests import oracles
from tests.methods import relative_error

SAMPLES = pytest.mark.parametrize("num_samples", [1, 3])
SIXTEEN = [torch.bfloat16, torch.float16]


def script(steps: int, num_samples: int) -> list[float]:
    """Losses that a closure may return, with O(1) projected gradients at eps = 1e-3."""
    g = np.random.default_rng(7)
    return [float(x) for x in 1.0 + 2e-3 * g.standard_normal(steps * 2 * num_samples)]


def in_turn(values: Iterable[Any]) -> Callable[..., Any]:
    """A closure that returns these, as they are."""
    it = iter(values)
    return lambda *_: next(it)


def assert_equal_to_rounding(model: nn.Module, expected: oracles.Theta, start: oracles.Theta, passes: int) -> None:
    """Each pass rounds an element twice (decay, then the sum); scalars are rounded to float32, 2^-24 of the movement."""
    moved = oracles.theta_of(model)
    for i, want in expected.items():
        bound = 2.0**-24 * (2 * passes * (np.maximum(abs(want), abs(start[i])) + 0.01) + 4 * abs(want - start[i]))
        worst = (abs(moved[i] - want) / bound).max()
        assert worst < 1, f"tensor {i}: {worst} times what rounding explains"
    assert relative_error(moved, expected, start) < 1e-3  # the weights did move by much more than that
