"""A journal that goes on from a checkpoint of its run."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import zokern
from tests.models import all_bits, same_bits, small, tokens
from zokern.journal import JournalError, Reader


def optimizer(model: torch.nn.Module, **more: Any) -> zokern.MeZO:
    return zokern.MeZO(model, lr=1e-2, **{"update": "adam", **more})


def steps(model: torch.nn.Module, opt: zokern.MeZO, numbers: range) -> None:
    for t in numbers:
        opt.step(lambda t=t: model(tokens(t)))


def run(path: Path, at: int = 3, end: int = 6) -> tuple[Any, dict[str, Any], list[torch.Tensor]]:
    """A run of `end` steps with a checkpoint after `at`: its model and state there, and the weights at the end."""
    model = small()
    opt = optimizer(model)
    with zokern.journal.write(opt, path):
        steps(model, opt, range(at))
        zokern.journal.mark(opt)
        saved = copy.deepcopy(model), opt.state_dict()
        saved = saved[0], copy.deepcopy(saved[1])
        steps(model, opt, range(at, end))
    return *saved, all_bits(model)


@pytest.mark.parametrize("at", [0, 3, 6])
def test_the_run_goes_on_and_replays(tmp_path: Path, at: int) -> None:
    path = tmp_path / "run.zkj"
    model, state, end = run(path, at)
    whole = path.read_bytes()
    opt = optimizer(model)
    opt.load_state_dict(state)
    with zokern.journal.append(opt, path):
        steps(model, opt, range(at, 6))
    assert same_bits(all_bits(model), end)
    assert (tmp_path / "run.zkj.cut").exists()
    base = small()
    assert zokern.journal.replay(path, base) == 6
    assert same_bits(all_bits(base), end)
    assert len(Reader(path).header) > 0
    assert abs(path.stat().st_size - len(whole)) < 2000  # nothing is there twice


def test_marks_verify_a_replay_of_a_part(tmp_path: Path) -> None:
    path = tmp_path / "run.zkj"
    model, *_ = run(path)
    base = small()
    replayed = zokern.journal.replay(path, base, until=3)
    assert replayed.verified
    assert same_bits(all_bits(base), all_bits(model))
    with pytest.warns(zokern.ZokernWarning, match="no hash of the weights after step 4"):
        assert not zokern.journal.replay(path, small(), until=4).verified


def test_without_a_mark_a_replay_finds_other_weights(tmp_path: Path) -> None:
    path = tmp_path / "run.zkj"
    model, state, _ = run(path)
    opt = optimizer(model)
    opt.load_state_dict(state)
    steps(model, opt, range(3, 4))
    with zokern.journal.append(opt, path):  # at step 4, of which there is no hash
        steps(model, opt, range(4, 5))
    assert zokern.journal.replay(path, small()) == 5


def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "run.zkj"
    model, state, _ = run(path)
    before = path.read_bytes()

    def refuse(match: str, opt: zokern.MeZO) -> None:
        with pytest.raises(JournalError, match=match), zokern.journal.append(opt, path):
            pass
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    opt = optimizer(model)
    opt.load_state_dict(state)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    refuse("weights are not those that the run had after 3 steps; load the checkpoint's", opt)
    refuse("seed is 0 there, 7 in this optimizer", optimizer(small(), seed=7))
    with pytest.raises(JournalError, match="is writing no journal; begin one with"):
        zokern.journal.mark(opt)
    opt = optimizer(model := small())
    with zokern.journal.write(opt, tmp_path / "other.zkj"):
        with pytest.raises(JournalError, match="is writing a journal already"), zokern.journal.append(opt, path):
            pass
        steps(model, opt, range(1))


def test_of_another_run_that_was_longer(tmp_path: Path) -> None:
    """What the message says to do is done: a checkpoint that the journal reaches, or no journal."""
    path = tmp_path / "run.zkj"
    model, state, end = run(path)
    before = path.read_bytes()
    longer, later, _ = run(tmp_path / "longer.zkj", at=9, end=9)
    opt = optimizer(longer)
    opt.load_state_dict(later)
    with (
        pytest.raises(JournalError, match="the optimizer is at step 9, and the journal ends after 6 steps: ") as told,
        zokern.journal.append(opt, path),
    ):
        pass
    assert "its checkpoint is of another run, such as an earlier one in the same folder" in str(told.value)
    assert str(told.value).endswith("Load a checkpoint of step 6 or before, or go on without this journal")
    assert path.read_bytes() == before
    steps(longer, opt, range(9, 10))
    assert opt.counters["steps"] == 10
    opt = optimizer(model)
    opt.load_state_dict(state)
    with zokern.journal.append(opt, path):
        steps(model, opt, range(3, 6))
    assert same_bits(all_bits(model), end)


def test_weights_at_the_start_are_compared_with_those_of_the_run(tmp_path: Path) -> None:
    """A checkpoint of weights alone, whose optimizer counts from 0 again."""
    path = tmp_path / "run.zkj"
    model, *_ = run(path)
    before = path.read_bytes()
    with (
        pytest.raises(JournalError, match="weights are not those that the run had after 0 steps"),
        zokern.journal.append(optimizer(model), path),
    ):
        pass
    assert path.read_bytes() == before


@pytest.mark.parametrize("at", [0, 2])
def test_a_step_that_was_broken_off_stays(tmp_path: Path, at: int) -> None:
    """In place it has left its rounding in the weights: what a run goes on from is what the last mark has."""

    calls: list[int] = []

    def fail() -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return model(tokens(0))

    path = tmp_path / "run.zkj"
    model = small()
    opt = optimizer(model, placement="inplace")
    with zokern.journal.write(opt, path):
        steps(model, opt, range(at))
        clean = all_bits(model)
        with pytest.raises(KeyboardInterrupt):
            opt.step(fail)
    assert not same_bits(all_bits(model), clean)
    with zokern.journal.append(opt, path):
        steps(model, opt, range(at, at + 2))
    assert [one.name for one in tmp_path.iterdir()] == ["run.zkj"]  # nothing was cut off
    base = small()
    assert zokern.journal.replay(path, base) == at + 2
    assert same_bits(all_bits(base), all_bits(model))


def test_weights_from_before_a_step_that_was_broken_off(tmp_path: Path) -> None:
    """No mark is of them: what a checkpoint has that was made without one. The broken off step is cut off."""
    path = tmp_path / "run.zkj"
    model = small()
    opt = optimizer(model, placement="inplace")

    def fail() -> torch.Tensor:
        if opt.counters["forwards"] % 2:
            raise KeyboardInterrupt
        return model(tokens(0))

    with zokern.journal.write(opt, path):
        steps(model, opt, range(2))
        saved = copy.deepcopy(model), copy.deepcopy(opt.state_dict())
        with pytest.raises(KeyboardInterrupt):
            opt.step(fail)
    again = optimizer(saved[0], placement="inplace")
    again.load_state_dict(saved[1])
    with zokern.journal.append(again, path):
        steps(saved[0], again, range(2, 3))
    base = small()
    assert zokern.journal.replay(path, base) == 3
    assert same_bits(all_bits(base), all_bits(saved[0]))


@pytest.mark.parametrize("said", [2, 5])
def test_a_hash_of_another_step_than_the_journals_says_nothing(tmp_path: Path, said: int) -> None:
    """The optimizer's steps were set while it was written."""
    path = tmp_path / "run.zkj"
    model = small()
    opt = optimizer(model, update="sgd")
    with zokern.journal.write(opt, path):
        steps(model, opt, range(2))
        saved = copy.deepcopy(model)
        if said == 2:
            steps(model, opt, range(2, 4))
        opt.resumed(said, 0)
        zokern.journal.mark(opt)
    again = optimizer(saved, update="sgd")
    again.resumed(2, 0)
    with zokern.journal.append(again, path):
        steps(saved, again, range(2, 3))
    base = small()
    assert zokern.journal.replay(path, base) == 3
    assert same_bits(all_bits(base), all_bits(saved))


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_goes_on_in_its_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    from zokern.journal import format as journal_format

    monkeypatch.setattr(journal_format.start, "__defaults__", (version, 1e9))
    path = tmp_path / "run.zkj"
    model, state, _ = run(path)
    opt = optimizer(model)
    opt.load_state_dict(state)
    with zokern.journal.append(opt, path):
        steps(model, opt, range(3, 6))
    assert Reader(path).version == version
    assert zokern.journal.replay(path, small()) == 6


def test_a_mark_is_on_the_disk_and_not_after_a_record_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), fsync(descriptor)))
    opt = optimizer(model := small())
    with zokern.journal.write(opt, tmp_path / "run.zkj", sync=1e9):
        steps(model, opt, range(1))
        before = len(synced)
        zokern.journal.mark(opt)
        assert len(synced) == before + 1
        (recorder,) = opt.listeners
        recorder.broken = 1  # as a full disk leaves it
        with pytest.raises(JournalError, match="the record of step 1 could not be written"):
            zokern.journal.mark(opt)


def test_marks_stay_when_a_run_goes_on_from_them(tmp_path: Path) -> None:
    """And damage behind them does not matter, as it is cut off."""
    path = tmp_path / "run.zkj"
    model, state, end = run(path)
    whole = bytearray(path.read_bytes())
    mark = next(one for one in _all_marks(path) if one.done == 3)
    whole[mark.end + 3] ^= 1
    path.write_bytes(whole)
    opt = optimizer(model)
    opt.load_state_dict(state)
    with zokern.journal.append(opt, path):
        steps(model, opt, range(3, 6))
    assert same_bits(all_bits(model), end)
    for until in (3, 6):
        assert zokern.journal.replay(path, small(), until=until).verified


def _all_marks(path: Path) -> list[Any]:
    reader = Reader(path)
    for _ in reader.steps():
        pass
    return reader.marks


def test_through_what_a_framework_has_put_around_the_optimizer(tmp_path: Path) -> None:
    class Wrapper:
        def __init__(self, optimizer: zokern.MeZO) -> None:
            self.optimizer = optimizer

    path = tmp_path / "run.zkj"
    model, state, end = run(path)
    opt = optimizer(model)
    opt.load_state_dict(state)
    with zokern.journal.append(Wrapper(opt), path):  # type: ignore[arg-type]
        steps(model, opt, range(3, 6))
        zokern.journal.mark(Wrapper(opt))  # type: ignore[arg-type]
    assert same_bits(all_bits(model), end)


def test_a_run_that_began_later(tmp_path: Path) -> None:
    model = small()
    opt = optimizer(model, update="sgd")
    steps(model, opt, range(2))
    path = tmp_path / "late.zkj"
    with zokern.journal.write(opt, path):
        steps(model, opt, range(2, 4))
    with (
        pytest.raises(JournalError, match="begins at step 2, and the optimizer is at step 0"),
        zokern.journal.append(optimizer(small(), update="sgd"), path),
    ):
        pass
