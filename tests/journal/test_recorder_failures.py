"""A record that could not be written whole: the file ends with the last good one, and nothing follows."""

from __future__ import annotations

import copy
import errno
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zokern
from tests.methods import METHODS, build, equal, given, scripted, weights
from tests.models import small
from zokern import journal, sweep

CASE = METHODS["mezo"]


def limited(path: Path, room: int) -> None:
    """The file takes `room` bytes more and then none, as a full disk does: RLIMIT_FSIZE."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, hard))


def lifted() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize("room", [0, 1, 7, 20])
def test_a_full_disk(tmp_path: Path, room: int) -> None:
    """The step is done and counted; the journal is of the steps before it, and further steps are refused undone."""
    model, path = small(), tmp_path / "run.zkj"
    base = copy.deepcopy(model)
    opt = build(CASE, model)
    with journal.write(opt, path):
        opt.step(scripted(given(CASE, 0)))
        good, after = path.stat().st_size, weights(model)
        limited(path, room)
        try:
            with pytest.raises(OSError) as error:
                opt.step(scripted(given(CASE, 1)))
        finally:
            lifted()
        assert error.value.errno == errno.EFBIG
        assert opt.counters["steps"] == 2
        assert path.stat().st_size == good, "what was written of the record is taken off"
        done = weights(model)
        for _ in range(2):
            with pytest.raises(journal.JournalError, match=r"record of step 1 could not be written.*start another one"):
                opt.step(scripted(given(CASE, 2)))
            assert equal(weights(model), done)
            assert opt.counters["steps"] == 2
    assert path.stat().st_size == good, "nothing that waited in a buffer was added"
    assert journal.replay(path, base, verify=False) == 1
    assert equal(weights(base), after)
    # The remedy: leave the block, and start another one.
    base = copy.deepcopy(model)
    with journal.write(opt, tmp_path / "next.zkj"):
        opt.step(scripted(given(CASE, 2)))
    journal.replay(tmp_path / "next.zkj", base)
    assert equal(weights(base), weights(model))


def test_an_event_that_could_not_be_made_is_missed(tmp_path: Path) -> None:
    """A gap in the numbers of steps: nobody told the recorder, and what follows would be replayed from other weights."""

    class Failing(zokern.MeZO):
        failing = False

        def applied(self, ok: torch.Tensor) -> None:
            """So that `memory` is asked after the pass."""

        def memory(self) -> list[float]:
            if self.failing:
                raise ZeroDivisionError
            return []

    model = nn.Linear(4, 3)
    base, opt = copy.deepcopy(model), Failing(model, 1e-2)
    with journal.write(opt, tmp_path / "run.zkj"):
        opt.step(lambda: model.weight.sum())
        after = weights(model)
        opt.failing = True
        with pytest.raises(ZeroDivisionError):
            opt.step(lambda: model.weight.sum())
        assert opt.counters["steps"] == 2
        opt.failing = False
        with pytest.raises(journal.JournalError, match="record of step 1 could not be written"):
            opt.step(lambda: model.weight.sum())
    assert journal.replay(tmp_path / "run.zkj", base, verify=False) == 1
    assert equal(weights(base), after)


@pytest.mark.parametrize("name", ["mezo", "mezo-adamezo", "helene"])
@pytest.mark.parametrize("place", ["inplace", "shadow"])
@pytest.mark.parametrize("n", [0, 1])
def test_a_step_that_broke_off_is_replayed(name: str, place: str, n: int, tmp_path: Path) -> None:
    """Of a journal and the weights, whatever was raised in between: they agree to the bit."""
    case, model = METHODS[name], small()
    base, opt = copy.deepcopy(model), build(METHODS[name], model, placement=place)
    with journal.write(opt, tmp_path / "run.zkj"):
        opt.step(scripted(given(case, 0)))
        losses = iter(given(case, 1)[:n])
        with pytest.raises(StopIteration):
            opt.step(lambda: next(losses))
        opt.step(scripted(given(case, 1)))
    assert opt.counters["steps"] == 2
    journal.replay(tmp_path / "run.zkj", base)
    assert equal(weights(base), weights(model))


def test_a_restore_that_is_made_up_for_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    base, opt, run, calls = copy.deepcopy(model), build(CASE, model, placement="inplace"), sweep.run, [0]

    def failing(*args: Any) -> int:
        calls[0] += 1
        if calls[0] > 2:
            raise torch.OutOfMemoryError
        return run(*args)

    with journal.write(opt, tmp_path / "run.zkj"):
        monkeypatch.setattr(sweep, "run", failing)
        with pytest.raises(torch.OutOfMemoryError):
            opt.step(scripted(given(CASE, 0)))
        monkeypatch.undo()
        opt.step(scripted(given(CASE, 0)))
    journal.replay(tmp_path / "run.zkj", base)
    assert equal(weights(base), weights(model))
