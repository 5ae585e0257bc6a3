"""What a step tells those who listen: one event, with numbers from which the step can be done again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import zokern
from tests.methods import CASES, EPS, METHODS, SEED, Case, build, given, scripted, weights
from tests.models import small, tokens
from zokern.contract.reference import derive_seed
from zokern.directions import DIRECTIONS
from zokern.optim import base
from zokern.optim.events import StepEvent
from zokern.sweep import Member, Passes, Sweep

PLACEMENTS = pytest.mark.parametrize("placement", ["inplace", "shadow"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
NAN = [1.0, math.nan] + [1.0] * 8


def heard(opt: Any) -> list[StepEvent]:
    events: list[StepEvent] = []
    opt.listeners.append(events.append)
    return events


def make(placement: str = "inplace", **options: Any) -> tuple[Any, Any, list[StepEvent]]:
    model = small()
    opt = zokern.MeZO(model, 1e-2, eps=EPS, seed=SEED, placement=placement, **options)
    return model, opt, heard(opt)


class Again:
    """The weights and states of before the first step, and the passes of events over them."""

    def __init__(self, model: Any, opt: Any) -> None:
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.states = {
            name: {key: torch.full_like(p, value, dtype=dtype) for key, (dtype, value) in opt.state_spec.items()}
            for name, p in self.weights.items()
        }
        self.passes = Passes(DIRECTIONS[opt.options["distribution"]], "cpu")

    @torch.no_grad()
    def do(self, event: StepEvent) -> None:
        rows: dict[Any, int] = {}
        members = [
            Member(self.weights[name], tensor_id, rows.setdefault((group, key), len(rows)), name, self.states[name])
            for tensor_id, name, _, _, group, key, _ in event.layout["params"]
        ]
        for spec, numbers in event.passes:
            self.passes.run(Sweep(members), spec, numbers)

    def assert_same(self, model: Any, opt: Any) -> None:
        for name, p in model.named_parameters():
            assert torch.equal(self.weights[name], p), name
            for key, value in opt.state[p].items() if p in opt.state else ():
                assert torch.equal(self.states[name][key], value), f"{key} of {name}"


# ------------------------------------------------------------------------------------------------------------ its parts


def test_an_event_cannot_be_changed() -> None:
    model, opt, events = make()
    opt.step(lambda: model(tokens(0)))
    for part in dataclasses.fields(StepEvent):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(events[0], part.name, None)
    assert isinstance(events[0].passes, tuple)


@PLACEMENTS
@DTYPES
@CASES
def test_steps_can_be_done_again_from_their_events(case: Case, dtype: torch.dtype, placement: str) -> None:
    """After the run: nobody has written to an event's numbers meanwhile. In place, all passes; in copies, the update."""
    model = small(dtype)
    opt = build(case, model, placement=placement, weight_decay=0.1)
    again, events = Again(model, opt), heard(opt)
    for step in range(3):
        opt.step(scripted(given(case, step)))
    assert [event.step for event in events] == [0, 1, 2]
    assert {len(event.passes) for event in events} == {case.passes if placement == "inplace" else 1}
    for event in events:
        again.do(event)
    again.assert_same(model, opt)
    assert not torch.equal(model.norm.weight, small(dtype).norm.weight)


@pytest.mark.parametrize("name", ["mezo", "hizoo", "helene"])
def test_pipelined_steps_can_be_done_again(name: str) -> None:
    """The pass that fills the next step's copies too is told as the update alone."""
    model = small(torch.bfloat16)
    opt = build(METHODS[name], model, placement="shadow", pipelined=True)
    again, events = Again(model, opt), heard(opt)
    for step in range(3):
        opt.step(scripted(given(METHODS[name], step)))
    for event in events:
        assert len(event.passes) == 1
        again.do(event)
    again.assert_same(model, opt)


def test_passes_are_told_in_order() -> None:
    """There, across, and back with the update."""
    model, opt, events = make()
    opt.step(lambda: model(tokens(0)))
    seed, coefs = derive_seed(SEED, 0, 0), []
    for spec, numbers in events[0].passes:
        assert spec.rule.name == "axpy"
        assert numbers.seeds.tolist() == [seed]
        coefs.append(float(numbers.coefs))
    gradient = float(opt.metrics["projected_gradient"])
    assert coefs == pytest.approx([EPS, -2 * EPS, EPS - 1e-2 * gradient])


@pytest.mark.parametrize(("name", "count"), [("mezo", 2), ("gv", 4), ("greedy", 4), ("fzoo", 4), ("es", 5)])
def test_drawn_has_the_directions_by_seed(name: str, count: int) -> None:
    opt = build(METHODS[name], small())
    events = heard(opt)
    for step in range(2):
        opt.step(scripted(given(METHODS[name], step)))
        assert dict(events[step].drawn) == {derive_seed(SEED, step, k): k for k in range(count)}


def test_loss_rates_and_memory() -> None:
    model = small()
    first, *rest = model.parameters()
    opt = zokern.MeZO([{"params": [first], "lr": 0.25}, {"params": rest}], 0.5, update="adamezo", seed=SEED)
    events = heard(opt)
    for step in range(2):
        opt.param_groups[0]["lr"] = 0.25 / (step + 1)
        loss = opt.step(scripted([1.0, 2.5]))
        assert torch.equal(events[step].loss, loss)
        assert events[step].lrs == (0.25 / (step + 1), 0.5)
        assert events[step].memory == tuple(opt.memory()) != ()
        assert bool(events[step].ok)
    model, opt, events = make()
    opt.step(lambda: 1.0)
    assert events[0].memory == ()


# ---------------------------------------------------------------------------------------- steps that did not go through


@PLACEMENTS
@pytest.mark.parametrize("name", ["mezo", "mezo-adam", "hizoo"])
def test_a_skipped_step_is_told_too(name: str, placement: str) -> None:
    case, model = METHODS[name], small()
    opt = build(case, model, placement=placement)
    again, events = Again(model, opt), heard(opt)
    opt.step(scripted(given(case, 0)))
    with pytest.warns(zokern.ZokernWarning, match="not finite"):
        opt.step(scripted(NAN[: case.forwards]))
    opt.step(scripted(given(case, 2)))
    assert [event.step for event in events] == [0, 1, 2]
    assert [bool(event.ok) for event in events] == [True, False, True]
    assert torch.isnan(events[1].loss)
    assert len(events[1].passes) == (case.passes if placement == "inplace" else 1)
    for event in events:
        again.do(event)
    again.assert_same(model, opt)


class BreaksOff(Exception):
    pass


def breaking(model: Any, forward: int, error: type[BaseException]) -> Callable[[], Tensor]:
    calls: list[None] = []

    def closure() -> Tensor:
        calls.append(None)
        if len(calls) == forward:
            raise error
        return model(tokens(0))

    return closure


@pytest.mark.parametrize("error", [BreaksOff, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("placement", "forward", "passes"),
    [("inplace", 1, 2), ("inplace", 2, 3), ("inplace", 4, 5), ("shadow", 1, 0), ("shadow", 4, 0)],
)
def test_a_step_that_breaks_off_is_told_with_what_it_has_done(placement, forward, passes, error) -> None:
    """In place: the perturbations up to there, and what took the last one back. The next try has the same number."""
    model, opt, events = make(placement, num_samples=2)
    again = Again(model, opt)
    with pytest.raises(error):
        opt.step(breaking(model, forward, error))
    (event,) = events
    assert (event.step, event.ok, event.loss, event.memory) == (0, None, None, ())
    assert len(event.passes) == passes
    assert dict(event.drawn) == {derive_seed(SEED, 0, k): k for k in range(2)}
    assert event.lrs == (1e-2,)
    again.do(event)
    again.assert_same(model, opt)
    opt.step(lambda: model(tokens(0)))
    assert [event.step for event in events] == [0, 0]
    again.do(events[1])
    again.assert_same(model, opt)
    assert bool(events[1].ok)
    with pytest.raises(error):
        opt.step(breaking(model, forward, error))
    event = events[2]
    assert (event.step, event.ok, event.loss, event.memory) == (1, None, None, ()), "not the loss of the step before"


# ---------------------------------------------------------------------------------------------------------------- layout


def names(event: StepEvent) -> list[str]:
    return [name for _, name, *_ in event.layout["params"]]


def test_the_layout_is_the_same_object_until_something_changes() -> None:
    model, opt, events = make()

    def step(times: int = 1) -> StepEvent:
        for _ in range(times):
            opt.step(lambda: model(tokens(0)))
        return events[-1]

    first = step(3)
    assert all(event.layout is first.layout for event in events)
    assert names(first) == [name for name, _ in model.named_parameters()]
    model.norm.weight.requires_grad_(False)
    frozen = step(2)
    assert frozen.layout is not first.layout
    assert events[-2].layout is frozen.layout
    assert set(names(first)) - set(names(frozen)) == {"norm.weight"}
    assert names(events[0]) == names(first), "an earlier event still has its own"
    model.norm.weight.requires_grad_(True)
    assert step().layout == first.layout
    last = opt.param_groups[0]["params"].pop()
    opt.add_param_group({"params": [last], "lr": 0.1})
    moved = step()
    assert moved.layout["params"][-1][4] == 1
    assert moved.lrs == (1e-2, 0.1)


def test_blocks_that_are_left_out_do_not_change_the_layout() -> None:
    model = small()
    opt = zokern.LeZO(model, 1e-2, num_dropped=1, seed=SEED)
    events, moved = heard(opt), set()
    for step in range(6):
        before = weights(model)
        opt.step(lambda step=step: model(tokens(step)))
        moved.add(tuple(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)))
    assert len(moved) == 2, "one block, then the other"
    assert all(event.layout is events[0].layout for event in events)
    assert events[0].layout["layers"] == [1, 2]


# ------------------------------------------------------------------------------------------------------------- listeners


def raising(event: StepEvent) -> None:
    raise OSError("no space left")


@PLACEMENTS
def test_what_a_listener_raises_reaches_the_user_with_clean_weights(placement: str) -> None:
    """The step is done by then."""
    model, opt, _ = make(placement)
    opt.listeners.append(raising)
    with pytest.raises(OSError, match="no space left"):
        opt.step(lambda: model(tokens(0)))
    quiet, other, _ = make(placement)
    other.step(lambda: quiet(tokens(0)))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(quiet), strict=True))
    assert not torch.equal(model.norm.weight, small().norm.weight)
    opt.listeners.clear()
    opt.step(lambda: model(tokens(1)))


def test_a_step_whose_listener_raises_is_done() -> None:
    model, opt, _ = make()
    opt.listeners.append(raising)
    with pytest.raises(OSError, match="no space left"):
        opt.step(lambda: model(tokens(0)))
    assert opt.counters["steps"] == 1


def test_a_listener_that_raises_does_not_hide_why_the_step_broke_off() -> None:
    model, opt, _ = make()
    opt.listeners.append(raising)
    with pytest.raises(OSError, match="no space left") as raised:
        opt.step(breaking(model, 2, BreaksOff))
    assert isinstance(raised.value.__context__, BreaksOff)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(weights(model), weights(small()), strict=True))


def test_two_listeners_hear_the_same() -> None:
    model, opt, events = make()
    more = heard(opt)
    for step in range(2):
        opt.step(lambda step=step: model(tokens(step)))
    assert len(events) == len(more) == 2
    assert all(a is b for a, b in zip(events, more, strict=True))


def test_without_listeners_nothing_is_collected(monkeypatch) -> None:
    model, opt, events = make()
    listening: list[bool] = []

    def closure() -> Tensor:
        listening.append(opt._passes.listener is not None)
        return model(tokens(0))

    opt.step(closure)
    assert opt._passes.listener is None
    opt.listeners.clear()
    monkeypatch.setattr(base, "StepEvent", lambda *_: pytest.fail("nobody listens"))
    opt.step(closure)
    assert listening == [True, True, False, False]
    assert len(events) == 1


def test_listening_changes_no_bit() -> None:
    found = []
    for listens in (True, False):
        model, opt, _ = make(num_samples=2)
        if not listens:
            opt.listeners.clear()
        for step in range(3):
            opt.step(lambda step=step, model=model: model(tokens(step)))
        found.append([*weights(model), *opt.metrics.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
