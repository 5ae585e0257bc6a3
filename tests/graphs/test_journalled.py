"""Captured steps in a journal: the bytes of eager steps' journal, however late they come, and one launch a step."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import zokern
from tests.graphs.test_graphed import CAPTURED, batches, emulated, make
from tests.late import on_a_late_device
from tests.methods import METHODS, Case
from zokern import journal
from zokern.optim.events import StepEvent

__all__ = ["emulated"]


def run(case: Case, placement: str, path: Any, *, graphed: bool, lag: int = 8, number: int = 7, **options: Any) -> Any:
    """With a step that is skipped, and other lr in each."""
    data = batches(number, bad=2)
    model, opt, closure, scheduler = make(case, placement, torch.bfloat16, **options)
    base = copy.deepcopy(model)
    step = zokern.GraphedStep(opt, closure, data[0]) if graphed else lambda batch: opt.step(lambda: closure(batch))
    with journal.write(opt, path, lag=lag):
        for batch in data:
            step(batch)
            scheduler.step()
    return model, base


@pytest.mark.filterwarnings("ignore::zokern.ZokernWarning")
@pytest.mark.parametrize("case", [c for _, c in CAPTURED], ids=[n for n, _ in CAPTURED])
@pytest.mark.parametrize("placement", ["inplace", "shadow"])
def test_the_journal_is_that_of_eager_steps(emulated, case: Case, placement: str, tmp_path, monkeypatch) -> None:
    if case.method == "mezo-greedy" and placement == "inplace":
        pytest.skip("an eager step on the CPU knows the best seed, and moves less between two directions that are one")
    run(case, placement, tmp_path / "eager.zkj", graphed=False)
    model, base = run(case, placement, tmp_path / "graphed.zkj", graphed=True)
    assert (tmp_path / "graphed.zkj").read_bytes() == (tmp_path / "eager.zkj").read_bytes()
    late = on_a_late_device(monkeypatch)
    run(case, placement, tmp_path / "late.zkj", graphed=True)
    assert late.copies > 1
    assert (tmp_path / "late.zkj").read_bytes() == (tmp_path / "eager.zkj").read_bytes()
    journal.replay(tmp_path / "late.zkj", base)
    assert all(map(torch.equal, base.parameters(), model.parameters()))


@pytest.mark.parametrize("late", [False, True])
def test_eager_and_captured_steps_take_turns_in_a_journal(emulated, late: bool, tmp_path, monkeypatch) -> None:
    """It is begun after the capture; a run that is taken up from it goes on captured."""
    data = batches(12)
    model, opt, closure, _ = make(METHODS["mezo-adam"], "inplace", torch.float32)
    base, path = copy.deepcopy(model), tmp_path / "run.zkj"
    step = zokern.GraphedStep(opt, closure, data[0])
    if late:
        on_a_late_device(monkeypatch, 3)
    with journal.write(opt, path):
        for i, batch in enumerate(data[:8]):
            if i in (2, 3, 6):
                opt.step(lambda batch=batch: closure(batch))
            else:
                step(batch)
    assert journal.replay(path, copy.deepcopy(base)) == 8
    other, again, closure_again, _ = make(METHODS["mezo-adam"], "inplace", torch.float32)
    with journal.resume(again, path) as done:
        assert done == 8
        graphed = zokern.GraphedStep(again, closure_again, data[0])
        for batch in data[8:]:
            graphed(batch)
    for batch in data[8:]:
        step(batch)
    assert all(map(torch.equal, other.parameters(), model.parameters()))
    assert journal.replay(path, base) == 12
    assert all(map(torch.equal, base.parameters(), model.parameters()))


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


VIEWS = {"slice.Tensor", "unbind.int", "select.int", "detach", "alias"}
ON_THE_HOST = {"_local_scalar_dense"}  # of the count of skipped steps, which an emulated graph has there


@pytest.mark.parametrize("journalled", [False, True])
def test_a_step_is_one_launch(emulated, journalled: bool, tmp_path, monkeypatch) -> None:
    """Beside it: the batch's copies, and one of the step's numbers. Nothing is filled in that has not changed."""
    data = batches(6)
    _, opt, closure, _ = make(METHODS["hizoo"], "inplace", torch.float32)
    on_a_late_device(monkeypatch, None)
    step = zokern.GraphedStep(opt, closure, data[0])
    if journalled:
        block = journal.write(opt, tmp_path / "run.zkj")
        block.__enter__()
    step(data[0])
    monkeypatch.setattr(type(step._graphs.kept[0].graph), "launch", lambda graph: None)
    for batch in data[1:]:
        with Calls() as calls:
            step(batch)
        assert [name for name in calls.names if name not in VIEWS | ON_THE_HOST] == ["copy_"] * len(batch) + ["clone"]
    if journalled:
        block.__exit__(None, None, None)


def test_metrics_stay_what_they_were(emulated) -> None:
    """The next launch fills the same memory."""
    data = batches(4)
    _, opt, closure, _ = make(METHODS["mezo"], "inplace", torch.float32)
    step = zokern.GraphedStep(opt, closure, data[0])
    kept = [(step(batch), dict(opt.metrics)) for batch in data]
    _, opt, closure, _ = make(METHODS["mezo"], "inplace", torch.float32)
    for (loss, metrics), batch in zip(kept, data, strict=True):
        assert torch.equal(loss, opt.step(lambda batch=batch: closure(batch)))
        assert metrics.keys() == opt.metrics.keys()
        assert all(torch.equal(metrics[name], opt.metrics[name]) for name in metrics)
        assert all(value.shape == () and value.dtype == torch.float32 for value in metrics.values())


def test_a_journal_that_cannot_go_on_refuses_a_launch(emulated, tmp_path) -> None:
    data = batches(3)
    model, opt, closure, _ = make(METHODS["mezo"], "inplace", torch.float32)
    step = zokern.GraphedStep(opt, closure, data[0])
    with journal.write(opt, tmp_path / "run.zkj"):
        step(data[0])
        opt.listeners[0].broken = 1
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(journal.JournalError, match="record of step 1 could not be written"):
            step(data[1])
    assert opt.counters["steps"] == 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_a_listener_hears(emulated) -> None:
    """The same as of an eager step. Warm-up and capture are told to nobody."""
    data, told = batches(3), []

    def heard(graphed: bool) -> list[tuple[Any, ...]]:
        _, opt, closure, _ = make(METHODS["hizoo"], "inplace", torch.float32)
        events: list[tuple[Any, ...]] = []

        def listen(event: StepEvent) -> None:
            numbers = [(told.seeds.tolist(), told.coefs.tolist(), told.shared.tolist()) for _, told in event.passes]
            lrs = [float(torch.tensor(float(lr))) for lr in event.lrs]
            events.append((event.step, bool(event.ok), float(event.loss or 0.0), lrs, dict(event.drawn), numbers))

        opt.listeners.append(listen)
        step = zokern.GraphedStep(opt, closure, data[0]) if graphed else None
        for batch in data:
            told.append(step(batch) if step else opt.step(lambda batch=batch: closure(batch)))
        return events

    eager, captured = heard(False), heard(True)
    assert eager == captured
    assert len(captured) == 3
    assert all(math.isfinite(float(loss)) for loss in told)


def test_a_listener_that_raises_comes_after_the_step(emulated) -> None:
    data = batches(2)
    _, opt, closure, _ = make(METHODS["mezo"], "inplace", torch.float32)
    step = zokern.GraphedStep(opt, closure, data[0])

    def failing(event: StepEvent) -> None:
        raise ZeroDivisionError

    heard: list[Tensor | None] = []
    opt.listeners += [failing, lambda event: heard.append(event.loss)]
    with pytest.raises(ZeroDivisionError):
        step(data[0])
    assert opt.counters["steps"] == len(heard) == 1
    opt.listeners.clear()
    step(data[1])
    assert opt.counters["steps"] == 2
