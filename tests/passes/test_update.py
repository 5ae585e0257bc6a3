"""What a method asks of a pass, looked at on the host: as torch would look at it."""

from __future__ import annotations

import math

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zokern.passes.update import BEYOND, Update

LARGEST = 2.0**128 - 2.0**104  # of float32
NUMBERS = st.floats(width=64) | st.sampled_from([0.0, 1.0, LARGEST, BEYOND, math.nextafter(BEYOND, 0.0)])


@settings(max_examples=200, deadline=None)
@given(st.lists(NUMBERS, min_size=4, max_size=4), st.lists(NUMBERS, min_size=2, max_size=2))
@example([1.0, 1.0, 1.0, math.nan], [math.inf, 1.0])
@example([-BEYOND, 0.0, 0.0, 0.0], [1.0, 1.0])
@example([-math.nextafter(BEYOND, 0.0), 0.0, 0.0, 0.0], [LARGEST, 1.0])
def test_what_fits_is_what_float32_has_as_finite(coefs: list[float], decay: list[float]) -> None:
    of = {"A": torch.tensor(coefs, dtype=torch.float64).view(2, 2)}
    update = Update([1, 2], of, {"decay": torch.tensor(decay, dtype=torch.float64)})
    assert update.fits() == bool(torch.isfinite(update.values()).all())


def test_plain_numbers_are_those_of_the_tensors() -> None:
    shared = {"decay": torch.tensor([0.5, 1.0]), "step": torch.tensor([2.0, 3.0])}
    update = Update([1, 2], {"G": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, shared)
    assert update.plain == {"G": [[1.0, 2.0], [3.0, 4.0]], "decay": [0.5, 1.0], "step": [2.0, 3.0]}
