"""prefetch=True: a block's scratch is filled beside the block before. Same bits, twice the scratch, events in order."""

from __future__ import annotations

import pytest
import torch

from tests.methods import METHODS
from tests.placement import side_streams
from tests.placement.side_streams import Late, Recording
from tests.placement.test_pipelined import run, same

LANES = [None, Recording, Late]
DTYPES = [torch.float32, torch.bfloat16]


def compared(case, monkeypatch, kind, dtype=torch.bfloat16, **options) -> tuple[list[Recording], object]:
    """A run with prefetch beside one without; the lanes that it had, and its optimizer."""
    plain = run("stream", options.pop("pipelined", False), case, dtype, **options)
    lanes = [] if kind is None else side_streams.use(monkeypatch, kind)
    ahead = run("stream", options.pop("pipelined", False), case, dtype, prefetch=True, **options)
    same(plain, ahead)
    assert plain[1].counters == ahead[1].counters
    for one in lanes:
        assert not one.unordered
        assert not one.in_flight
    return lanes, ahead[1]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_of_stream(name: str, dtype: torch.dtype, monkeypatch) -> None:
    compared(METHODS[name], monkeypatch, Late, dtype, steps=3)
