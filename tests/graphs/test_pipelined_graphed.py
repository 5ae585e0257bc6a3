"""Pipelined steps in graphs: one graph for steps that find their first probe ready, one for those that do not."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

import zokern
from tests.graphs.test_graphed import batches, emulated, make
from tests.graphs.test_kinds import cut
from tests.methods import CASES, METHODS, Case
from tests.placement.test_pipelined import same
from zokern import journal

__all__ = ["emulated"]
PLACEMENTS = pytest.mark.parametrize("placement", ["shadow", "stream"])


def run(case: Case, placement: str, turns: str, **options: Any) -> Any:
    """A step for each letter: g is captured, e is eager, a letter that `BETWEEN` has is done between two steps."""
    data = iter(batches(len(turns), bad=options.pop("bad", None)))
    model, opt, closure, scheduler = make(case, placement, torch.bfloat16, pipelined=True, **options)
    step = zokern.GraphedStep(opt, closure)
    losses = []
    for turn in turns:
        if turn in BETWEEN:
            BETWEEN[turn](model, opt)
            continue
        batch = next(data)
        losses.append(step(batch) if turn == "g" else opt.step(lambda batch=batch: closure(batch)))
        scheduler.step()
    return model, opt, torch.stack(losses), step.captures


def other_eps(model: Any, opt: Any) -> None:
    for group in opt.param_groups:
        group["eps"] *= 2


def other_weights(model: Any, opt: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)


BETWEEN = {"x": other_eps, "w": other_weights}


@PLACEMENTS
@CASES
def test_the_bits_are_those_of_eager_steps(emulated, case: Case, placement: str) -> None:
    a, b = run(case, placement, "eeeeee"), run(case, placement, "gggggg")
    same(a[:3], b[:3])
    # A capture after a step, of HELENE's second kind or behind steps that come once, overwrites what was filled ahead.
    if b[3] == 2 and not case.remembers:
        assert a[1].counters == b[1].counters


@pytest.mark.filterwarnings("ignore:a loss was not finite:zokern.ZokernWarning")
@PLACEMENTS
@pytest.mark.parametrize("turns", ["ggeegegg", "egegge", "gxggxegg", "gwggweg", "ggewgxe", "gxw"])
def test_turns_and_what_happens_between(emulated, placement: str, turns: str) -> None:
    eager = turns.replace("g", "e")
    for name in ("mezo", "hizoo"):
        a, b = (run(METHODS[name], placement, one, bad=2) for one in (eager, turns))
        finite = a[2].isfinite()
        assert torch.equal(finite, b[2].isfinite())
        same((a[0], a[1], a[2][finite]), (b[0], b[1], b[2][finite]))
        first = turns.index("g")
        if first == 0:  # a capture after an eager step overwrites what that one has filled ahead
            assert a[1].counters == b[1].counters
        assert b[3] == 2


@PLACEMENTS
def test_two_kinds_of_graphs(emulated, placement: str) -> None:
    """The first step has nothing ready, and one after a change of eps. Ready copies save a pass over what they are of."""
    *_, captures = steady = run(METHODS["mezo"], placement, "gggg")
    changing = run(METHODS["mezo"], placement, "ggxgg")
    assert captures == changing[3] == 2
    assert changing[1].counters["elements_moved"] > steady[1].counters["elements_moved"]


@PLACEMENTS
def test_room_for_some_of_the_graphs(emulated, placement: str) -> None:
    """Each of two shapes has two graphs, and there is room for three in all: no kind is kept twice."""
    data, runs = batches(8), []
    for graphed in (True, False):
        model, opt, closure, _ = make(METHODS["mezo"], placement, torch.bfloat16, pipelined=True)
        step, losses = zokern.GraphedStep(opt, closure, max_graphs=3), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", zokern.ZokernWarning)  # of graphs that are captured again
            for i, batch in enumerate(data):
                if i == 4:  # 6 rows have their graph of steps that find a probe ready, and not the other one
                    other_eps(model, opt)
                own = cut(batch, 4 if i in (2, 6) else 6, 5)
                losses.append(step(own) if graphed else opt.step(lambda own=own, closure=closure: closure(own)))
                kinds = [one.kind for one in step._graphs.kept]
                assert len(kinds) <= 3
                assert all(kinds.count(kind) == 1 for kind in kinds)
        runs.append((model, opt, torch.stack(losses)))
    same(*runs)
    with pytest.raises(ValueError, match=r"max_graphs must be at least 2 with pipelined=True"):
        zokern.GraphedStep(opt, closure, max_graphs=1)


def test_in_a_journal(emulated, tmp_path) -> None:
    data, files = batches(6), []
    for turn in "eg":
        model, opt, closure, _ = make(METHODS["mezo-adam"], "shadow", torch.bfloat16, pipelined=True)
        base = copy.deepcopy(model)
        step = zokern.GraphedStep(opt, closure)
        with journal.write(opt, tmp_path / f"{turn}.zkj"):
            for batch in data:
                step(batch) if turn == "g" else opt.step(lambda batch=batch, closure=closure: closure(batch))
        files.append((tmp_path / f"{turn}.zkj").read_bytes())
        journal.replay(tmp_path / f"{turn}.zkj", base)
        assert all(map(torch.equal, base.parameters(), model.parameters()))
    assert files[0] == files[1]
