"""All single-bit flips and all prefixes of a journal of 60 steps, in both formats, and kills: minutes (make faults)."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest

import zokern
from tests.journal.test_journal import killed_again_and_again, weights
from tests.models import toy
from zokern import journal
from zokern.journal import format as journal_format

pytestmark = pytest.mark.faults
STEPS = 60


def of_sixty_steps(path: Path, version: int, monkeypatch: pytest.MonkeyPatch) -> zokern.MeZO:
    monkeypatch.setattr(journal_format.start, "__defaults__", (version, 1e9))
    model = toy()
    optimizer = zokern.MeZO(model, 1e-2)
    with journal.write(optimizer, path, sync=1e9):
        for _ in range(STEPS):
            optimizer.step(model)
    assert journal.Reader(path).version == version
    return optimizer


def found(path: Path, whole: list[bytes]) -> str:
    """What a reader makes of a changed file. No step that it gives may be another one than was written."""
    try:
        reader = journal.Reader(path)
    except journal.JournalError:
        return "refused"
    got = []
    try:
        for step in reader.steps():
            got.append(step.frame.tobytes() + bytes([step.flags, step.number]))
    except journal.JournalError:
        assert reader.state == "damaged"
    assert got == whole[: len(got)]
    if reader.state == "whole":
        assert len(got) == STEPS
    return reader.state


@pytest.mark.parametrize("version", [1, 2])
def test_every_flipped_bit_is_noticed(version, tmp_path, monkeypatch):
    """None is taken for a whole journal; none but those of the last record for a torn end, with all steps before it."""
    path, bad = tmp_path / "run.zkj", tmp_path / "bad.zkj"
    of_sixty_steps(path, version, monkeypatch)
    data, reader = path.read_bytes(), journal.Reader(path)
    whole = [step.frame.tobytes() + bytes([step.flags, step.number]) for step in reader.steps()]
    last = max(at for at in range(len(data) - 4) if data[at:].startswith(b'\x04{"step"')) - 1
    counts: Counter[tuple[str, bool]] = Counter()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        bad.write_bytes(changed)
        counts[found(bad, whole), bit // 8 >= last] += 1
    print(f"format {version}: {8 * len(data)} bits, {dict(counts)}")
    assert {state for state, _ in counts} == {"refused", "damaged", "torn"}
    assert ("torn", False) not in counts
    assert set(counts) >= {("torn", True), ("damaged", False), ("refused", False)}


@pytest.mark.parametrize("version", [1, 2])
def test_no_prefix_is_taken_for_the_whole(version, tmp_path, monkeypatch):
    path, cut = tmp_path / "run.zkj", tmp_path / "cut.zkj"
    of_sixty_steps(path, version, monkeypatch)
    data = path.read_bytes()
    base = toy()
    whole = [step.frame.tobytes() + bytes([step.flags, step.number]) for step in journal.Reader(path).steps()]
    counts: Counter[str] = Counter()
    for size in range(len(data)):
        cut.write_bytes(data[:size])
        counts[found(cut, whole)] += 1
        with pytest.raises(journal.JournalError):
            journal.replay(cut, copy.deepcopy(base))
    print(f"format {version}: {len(data)} prefixes, {dict(counts)}")
    assert set(counts) == {"refused", "torn", "unverified"}
    assert weights(base)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_hundred_kills(tmp_path):
    """kill -9 at 200 random moments of one run: its bits are those of a run that nobody killed."""
    killed_again_and_again(tmp_path, number=12_000, kills=200, seconds=1800)
