"""A run that is taken up behind a skipped step is the one that was not interrupted."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

from tests.methods import METHODS, build, equal, given, scripted, weights
from tests.models import small
from zokern import journal
from zokern.hashing import hash_of


@pytest.mark.parametrize("name", ["mezo", "mezo-adam", "mezo-adam-one-sided", "mezo-adamezo", "helene", "hizoo"])
@pytest.mark.filterwarnings("ignore:a loss was not finite")
@pytest.mark.parametrize("skipped", [[1], [0, 2]])
def test_the_skip_lies_before_the_break(name: str, skipped: list[int], tmp_path: Path) -> None:
    case, whole = METHODS[name], small()
    first, start = copy.deepcopy(whole), copy.deepcopy(whole)

    def losses(t: int) -> list[float]:
        return [math.nan] * case.forwards if t in skipped else given(case, t)

    opt, half = build(case, whole), build(case, first)
    for t in range(5):
        opt.step(scripted(losses(t)))
    with journal.write(half, tmp_path / "run.zkj"):
        for t in range(3):
            half.step(scripted(losses(t)))
    again = build(case, start)
    with journal.resume(again, tmp_path / "run.zkj") as done:
        assert done == 3
        assert again.skipped_steps == len(skipped)
        for t in (3, 4):
            again.step(scripted(losses(t)))
    assert equal(weights(start), weights(whole))
    assert again.skipped_steps == opt.skipped_steps == len(skipped)
    assert again.counters["steps"] == 5
    if name.startswith("mezo-adam") and "adamezo" not in name:
        assert [int(count) for _, count in again.history()] == [5 - len(skipped)]


def test_a_hash_knows_the_type() -> None:
    """The bytes, the names and the shapes are the same."""
    bits = torch.arange(6, dtype=torch.int16)
    hashes = {hash_of([("w", bits.view(dtype))]) for dtype in (torch.int16, torch.bfloat16, torch.float16)}
    assert len(hashes) == 3
