"""Captured steps of methods that look back on earlier steps: AdaMeZO's directions, and the one that MeZO-GV keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.graphs.test_graphed import batches, emulated, make
from tests.methods import METHODS, saved
from tests.placement.test_pipelined import same
from zokern import journal

NAMES = ["mezo-adamezo", "mezo-adamezo-released", "gv-kept"]
LOOKING_BACK = pytest.mark.parametrize("name", NAMES)
__all__ = ["emulated"]  # a fixture
Change = Callable[[int, zokern.optim.base.ZerothOrderOptimizer], None]


def history(opt) -> list[object]:
    return [
        [x.tolist() if isinstance(x, Tensor) else x for x in entry] if isinstance(entry, list) else entry
        for entry in opt.state_dict()["zokern"]["history"]
    ]


def run(name: str, data, captured: Callable[[int], bool], change: Change | None = None, placement="shadow"):
    """Steps, some of them captured ones. What is told of them: weights, losses and, after each, the history."""
    model, opt, closure, scheduler = make(METHODS[name], placement, torch.float32)
    if name == "gv-kept":  # a step that is told to be large moves a count on the CPU, which no GPU does
        scheduler.base_lrs = [opt.param_groups[0]["lr"] / 10]
    graph, losses, remembered = None, [], []
    for i, batch in enumerate(data):
        if change is not None and i == 4:
            change(opt)
            if graph is not None and captured(i):
                with pytest.raises(RuntimeError, match="make a new GraphedStep"):
                    graph(batch)
            graph = None
        if captured(i):
            graph = zokern.GraphedStep(opt, closure, batch) if graph is None else graph
            losses.append(graph(batch))
        else:
            losses.append(opt.step(lambda closure=closure, batch=batch: closure(batch)))
        if change is None:
            scheduler.step()
        remembered.append(history(opt))
    return (model, opt, torch.stack(losses)), remembered


TURNS = {"captured": "cccccccc", "captured later": "eeeecccc", "in turn": "cecceecc", "eager last": "cccceeee"}


@LOOKING_BACK
@pytest.mark.parametrize("turns", TURNS.values(), ids=list(TURNS))
def test_eager_and_captured_steps_share_what_they_remember(emulated, name: str, turns: str) -> None:
    """After each step, not only at the end."""
    data = batches(len(turns))
    (plain, before), (mixed, after) = run(name, data, lambda i: False), run(name, data, lambda i: turns[i] == "c")
    assert before == after
    same(plain, mixed)
    assert plain[1].counters == mixed[1].counters
    for key in ("loss", "projected_gradient"):
        assert torch.equal(plain[1].metrics[key], mixed[1].metrics[key])


@LOOKING_BACK
@pytest.mark.filterwarnings("ignore::zokern.ZokernWarning")
@pytest.mark.parametrize("bad", [1, 4, 5])
def test_a_skipped_step_is_remembered_as_one(emulated, name: str, bad: int) -> None:
    data = batches(8, bad=bad)
    runs = [run(name, data, lambda i, turns=turns: turns[i] == "c") for turns in ("eeeeeeee", "cccccecc")]
    assert runs[0][1] == runs[1][1]
    assert [r[0][1].skipped_steps for r in runs] == [1, 1]
    for p, q in zip(*(r[0][0].parameters() for r in runs), strict=True):
        assert torch.equal(p, q)


def _load(opt) -> None:
    opt.load_state_dict(saved(opt.state_dict()))


def _group(opt) -> None:
    torch.manual_seed(9)
    opt.add_param_group({"params": [nn.Parameter(torch.randn(3))], "eps": 1e-2})


@LOOKING_BACK
@pytest.mark.parametrize("change", [_load, _group])
def test_after_a_load_and_with_a_new_group(emulated, name: str, change: Change) -> None:
    """GraphedStep asks for a new one, which goes on from the same history."""
    data = batches(8)
    placement = "inplace" if change is _group else "shadow"  # the parameter is of no module
    plain, before = run(name, data, lambda i: False, change, placement)
    for turns in ("cccccccc", "ccceeccc", "ccccecce"):
        mixed, after = run(name, data, lambda i, turns=turns: turns[i] == "c", change, placement)
        assert before == after
        same(plain, mixed)


@LOOKING_BACK
def test_a_run_taken_up_from_its_journal(emulated, name: str, tmp_path) -> None:
    data, path, runs = batches(8), tmp_path / "run.zkj", []
    for resumed in (False, True):
        model, opt, closure, _ = make(METHODS[name], "shadow", torch.float32)
        with journal.resume(opt, path) if resumed else journal.write(opt, path):
            for batch in data[: 0 if resumed else 4]:
                opt.step(lambda closure=closure, batch=batch: closure(batch))
        step = zokern.GraphedStep(opt, closure, data[4]) if resumed else None
        losses = [step(b) if step else opt.step(lambda c=closure, b=b: c(b)) for b in data[4:]]
        runs.append((model, opt, torch.stack(losses)))
    assert history(runs[0][1]) == history(runs[1][1])
    same(*runs)


@LOOKING_BACK
def test_trying_a_step_remembers_nothing(emulated, name: str) -> None:
    _, opt, closure, _ = make(METHODS[name], "inplace", torch.float32)
    for batch in batches(4):
        opt.step(lambda batch=batch: closure(batch))
    before = history(opt)
    zokern.GraphedStep(opt, closure, batches()[0])
    assert history(opt) == before
    assert before


def test_kinds_of_steps_that_come_once_are_not_captured(emulated) -> None:
    """Of a long look back there would be a graph for each of the first steps."""
    _, opt, closure, _ = make(METHODS["mezo-adamezo"], "shadow", torch.float32, horizon=5)
    step = zokern.GraphedStep(opt, closure, batches()[0])
    for batch in batches(8):
        step(batch)
    assert [one.kind[0] for one in step._graphs.kept] == [1, 5]


@LOOKING_BACK
def test_a_step_that_breaks_off_is_forgotten(emulated, name: str, monkeypatch) -> None:
    """An eager one, between captured ones: the history in device memory is put back."""
    data, runs = batches(6), []
    for broken in (False, True):
        model, opt, closure, _ = make(METHODS[name], "shadow", torch.float32)
        step = zokern.GraphedStep(opt, closure, data[0])
        losses = [step(batch) for batch in data[:4]]
        if broken:
            before = history(opt)

            def breaks(*given: object) -> None:
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(opt._placement, "update", breaks)
                with pytest.raises(KeyboardInterrupt):
                    opt.step(lambda closure=closure: closure(data[5]))
            assert history(opt) == before
        losses += [step(batch) for batch in data[4:]]
        runs.append((model, opt, torch.stack(losses)))
    assert history(runs[0][1]) == history(runs[1][1])
    same(*runs)
