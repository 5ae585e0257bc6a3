"""A journal that falls behind a device: the bytes of one that does not, always a prefix of the run, all of it at last."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import zokern
from tests.journal.test_journal import CASES, Trouble, build, killed_again_and_again, scheduled, steps, weights
from tests.late import Late, on_a_late_device
from tests.models import toy
from zokern import journal
from zokern.journal import behind

BROKEN = pytest.mark.filterwarnings("ignore::zokern.ZokernWarning", "ignore:Detected call of:UserWarning")


def run(path: Path, case: str = "mezo", *, number: int = 9, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """A run with a skipped step and one that breaks off; `lag` is the journal's."""
    lag = {"lag": options.pop("lag")} if "lag" in options else {}
    model = toy(dtype)
    optimizer = build(case, model, **options)
    with journal.write(optimizer, path, **lag):
        steps(optimizer, scheduled(optimizer), Trouble(model), range(number))
    return model


@BROKEN
@pytest.mark.parametrize("placement", ["inplace", "shadow"])
@pytest.mark.parametrize("case", CASES)
def test_the_bytes_are_those_of_a_journal_that_waits(case: str, placement: str, tmp_path, monkeypatch) -> None:
    run(tmp_path / "waits.zkj", case, placement=placement)
    late = on_a_late_device(monkeypatch)
    model = run(tmp_path / "late.zkj", case, placement=placement)
    assert late.copies
    assert (tmp_path / "late.zkj").read_bytes() == (tmp_path / "waits.zkj").read_bytes()
    base = toy(torch.bfloat16)
    journal.replay(tmp_path / "late.zkj", base)
    assert all(map(torch.equal, weights(base), weights(model)))


@BROKEN
def test_of_folds_and_layers(tmp_path, monkeypatch) -> None:
    options = (
        {"distribution": zokern.LowRank(1), "placement": "forward", "fold_every": 3, "dtype": torch.float32},
        {"layers": zokern.RandomBlocks(1), "placement": "shadow"},
    )
    for i, one in enumerate(options):
        run(tmp_path / f"waits{i}.zkj", **one)
    late = on_a_late_device(monkeypatch)
    for i, one in enumerate(options):
        run(tmp_path / f"late{i}.zkj", **one)
        assert (tmp_path / f"late{i}.zkj").read_bytes() == (tmp_path / f"waits{i}.zkj").read_bytes()
    assert late.copies


@pytest.mark.parametrize("lag", [0, 1, 3, 8, 40])
@pytest.mark.parametrize("polls", [None, 0, 3])
def test_the_file_is_a_prefix_and_no_more_than_lag_behind(lag: int, polls: int | None, tmp_path, monkeypatch) -> None:
    """polls None: nothing comes before it is waited for. The device has something to do whenever a step waits."""
    model, path = toy(), tmp_path / "run.zkj"
    late = on_a_late_device(monkeypatch, polls)
    optimizer = build("mezo", model)
    done, behind_by, contents = [], [], []
    with journal.write(optimizer, path, lag=lag):
        for number in range(50):
            optimizer.step(model)
            contents.append(path.read_bytes())
            done.append(sum(1 for _ in journal.Reader(path).steps()))
            behind_by.append(journal.progress(optimizer).behind)
            assert done[-1] + behind_by[-1] == number + 1
        waits = journal.progress(optimizer).waits
        assert waits == late.waits
    whole = path.read_bytes()
    assert all(whole.startswith(part) for part in contents)
    assert max(behind_by) <= lag
    assert sum(1 for _ in journal.Reader(path).steps()) == 50
    assert (waits > 0) == (polls is None or (polls == 3 and lag < 3))
    if polls is None:
        assert max(behind_by) == lag, "it waits no sooner than it must"
    assert late.copies == -(-50 // min(16, max(1, lag // 2)))


@pytest.mark.parametrize(("lag", "idle"), [(1, True), (8, True), (8, False), (0, True)])
def test_a_wait_that_costs_time_is_told_once(lag: int, idle: bool, tmp_path, monkeypatch) -> None:
    """idle: when a step has waited for the oldest, everything else has come too, so the device had nothing left to do."""

    class Sudden(Late):
        def wait(self) -> torch.Tensor:
            if idle:
                Sudden.polls = -1
            return super().wait()

    on_a_late_device(monkeypatch)
    Sudden.polls = None
    monkeypatch.setattr(behind, "Arriving", Sudden)
    model = toy()
    optimizer = build("mezo", model)
    with warnings.catch_warnings(record=True) as told, journal.write(optimizer, tmp_path / "run.zkj", lag=lag):
        warnings.simplefilter("always")
        for _ in range(30):
            optimizer.step(model)
            Sudden.polls = None
    said = [str(one.message) for one in told if "lag" in str(one.message)]
    if idle and lag:
        assert len(said) == 1
        assert f"lag is {lag}; give a larger one" in said[0]
    else:
        assert said == []


def test_a_lag_in_seconds(tmp_path, monkeypatch) -> None:
    on_a_late_device(monkeypatch, None)
    clock = [100.0]
    monkeypatch.setattr(behind.time, "monotonic", lambda: clock[0])
    model, path = toy(), tmp_path / "run.zkj"
    optimizer = build("mezo", model)
    with journal.write(optimizer, path, lag=2.0):
        for _ in range(10):
            optimizer.step(model)
            clock[0] += 0.5
            oldest = 100.0 + 0.5 * sum(1 for _ in journal.Reader(path).steps())
            assert clock[0] - 0.5 - oldest <= 2.0
        assert journal.progress(optimizer).waits > 0
        assert journal.progress(optimizer).behind > 2, "it waits no sooner than it must"


@pytest.mark.parametrize("what", ["flush", "mark", "state_dict", "a step that breaks off", "leaving", "an error"])
def test_what_writes_all_that_is_done(what: str, tmp_path, monkeypatch) -> None:
    on_a_late_device(monkeypatch, None)
    model, path = toy(), tmp_path / "run.zkj"
    base, optimizer = copy.deepcopy(model), build("mezo", model, placement="inplace")

    def written() -> int:
        return sum(1 for step in journal.Reader(path).steps() if not step.flags & journal.format.BROKEN_OFF)

    def do() -> None:
        if what == "flush":
            journal.flush(optimizer)
        elif what == "mark":
            journal.mark(optimizer)
        elif what == "state_dict":
            optimizer.state_dict()
        elif what == "an error":
            raise ZeroDivisionError
        elif what == "a step that breaks off":
            calls = iter([torch.tensor(1.0)])
            with pytest.raises(StopIteration):
                optimizer.step(lambda: next(calls))

    try:
        with journal.write(optimizer, path):
            for _ in range(5):
                optimizer.step(model)
            assert written() == 0
            do()
            assert what == "leaving" or written() == 5
            assert what == "leaving" or journal.progress(optimizer).behind == 0
    except ZeroDivisionError:
        assert what == "an error"
    assert written() == 5
    assert journal.replay(path, base) == 5
    assert all(map(torch.equal, weights(base), weights(model)))


class Lost(Late):
    """A device that has failed."""

    def wait(self) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_device_that_fails(tmp_path, monkeypatch) -> None:
    """What was raised first is raised; what is missing is told; the journal is of the steps before."""
    late = on_a_late_device(monkeypatch, 0)
    model, path = toy(), tmp_path / "run.zkj"
    optimizer = build("mezo", model)

    def fails() -> None:
        with journal.write(optimizer, path, lag=4):
            for _ in range(4):
                optimizer.step(model)
            monkeypatch.setattr(behind, "Arriving", Lost)
            monkeypatch.setattr(Lost, "polls", None)
            for _ in range(3):
                optimizer.step(model)
            raise ZeroDivisionError

    with (
        pytest.warns(zokern.ZokernWarning, match=r"ends before step 4, and 3 steps.*illegal memory access"),
        pytest.raises(ZeroDivisionError),
    ):
        fails()
    assert late.copies == 2
    assert sum(1 for _ in journal.Reader(path).steps()) == 4


def test_a_device_that_fails_while_a_step_waits(tmp_path, monkeypatch) -> None:
    """The step is done, and those that follow are refused."""
    on_a_late_device(monkeypatch)
    monkeypatch.setattr(behind, "Arriving", Lost)
    monkeypatch.setattr(Lost, "polls", None)
    model = toy()
    optimizer = build("mezo", model)
    with journal.write(optimizer, tmp_path / "run.zkj", lag=1):
        optimizer.step(model)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            optimizer.step(model)
        assert optimizer.counters["steps"] == 2
        with pytest.raises(journal.JournalError, match=r"record of step 0 could not be written.*start another one"):
            optimizer.step(model)
    assert sum(1 for _ in journal.Reader(tmp_path / "run.zkj").steps()) == 0


def test_a_full_disk_after_the_step(tmp_path, monkeypatch) -> None:
    """The error comes with a later step, and names the one whose record is missing; nothing follows in the file."""
    on_a_late_device(monkeypatch, None)
    model, path = toy(), tmp_path / "run.zkj"
    optimizer = build("mezo", model)
    with journal.write(optimizer, path, lag=4):
        optimizer.step(model)
        optimizer.step(model)
        journal.flush(optimizer)
        (recorder,) = optimizer.listeners
        monkeypatch.setattr(recorder.writer, "_write", lambda data: (_ for _ in ()).throw(OSError(28, "No space")))
        for _ in range(4):
            optimizer.step(model)
        with pytest.raises(OSError, match="No space"):
            optimizer.step(model)
        with pytest.raises(journal.JournalError, match="record of step 2 could not be written"):
            optimizer.step(model)
        with pytest.raises(journal.JournalError, match="record of step 2 could not be written"):
            journal.flush(optimizer)
    assert sum(1 for _ in journal.Reader(path).steps()) == 2


@pytest.mark.parametrize("value", [-1, -0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("way", ["write", "resume", "append"])
def test_a_lag_that_is_none(value: float, way: str, tmp_path) -> None:
    run(tmp_path / "run.zkj", number=1)
    block = getattr(journal, way)(build("mezo", toy(torch.bfloat16)), tmp_path / "new.zkj", lag=value)
    with pytest.raises(ValueError, match=r"lag is .*whole number of steps or a float of seconds"), block:
        pass
    assert not (tmp_path / "new.zkj").exists()


def test_a_lag_of_another_type(tmp_path) -> None:
    for value in (True, "2", None):
        block = journal.write(build("mezo", toy()), tmp_path / "new.zkj", lag=value)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="lag must be a whole number of steps or a float of seconds, got"), block:
            pass


@pytest.mark.parametrize("ask", [journal.flush, journal.progress])
def test_no_journal_is_being_written(ask: Any) -> None:
    with pytest.raises(journal.JournalError, match=f"{ask.__name__}: this optimizer is writing no journal"):
        ask(build("mezo", toy()))


UNCLOSED = """
import pytest
import sys, torch, zokern
from tests.late import on_a_late_device
from tests.models import toy
on_a_late_device(pytest.MonkeyPatch(), None)
torch.manual_seed(0)
model = toy()
optimizer = zokern.MeZO(model, 1e-2)
block = zokern.journal.write(optimizer, sys.argv[1])
block.__enter__()
for _ in range(5):
    optimizer.step(model)
assert zokern.journal.progress(optimizer).behind == 5
"""


def test_a_block_that_is_never_left(tmp_path) -> None:
    """The end of the process writes what was done, and says that there is no hash."""
    path = tmp_path / "run.zkj"
    done = subprocess.run([sys.executable, "-c", UNCLOSED, path], capture_output=True, text=True, check=True)
    assert f"{path}: the block that writes this journal was not left" in done.stderr
    assert "--no-verify" in done.stderr
    assert sum(1 for _ in journal.Reader(path).steps()) == 5
    with pytest.raises(journal.JournalError):
        journal.replay(path, toy())
    assert journal.replay(path, toy(), verify=False) == 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_kills_cost_no_more_than_lag(tmp_path, monkeypatch) -> None:
    """A prefix of the run, never a mixture; taken up from there it ends with the run's bits."""
    on_a_late_device(monkeypatch, 5)  # the processes are forks
    killed_again_and_again(tmp_path, number=600, kills=8, seconds=120)
