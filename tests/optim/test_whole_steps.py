"""A step is whole or was not, wherever it breaks off (whole.py). A sample here; `make faults` goes through all of it."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import zokern
from tests.methods import METHODS, build, equal, given, scripted, weights
from tests.models import Mixed, small
from tests.optim import whole
from zokern import backends, sweep
from zokern.contract.rules import RULES
from zokern.directions import DIRECTIONS
from zokern.interrupts import HeldInterrupts, Waiting
from zokern.passes import operators
from zokern.passes.spec import AXPY, PassNumbers
from zokern.sweep import Member, Passes, Sweep

SAMPLE = [
    ("mezo", "inplace", None), ("mezo-adam", "inplace", 0.0), ("mezo-adamezo", "shadow", None),
    ("helene", "shadow-pipelined", None), ("hizoo", "stream-pipelined", None), ("greedy-curved", "stream", 0.0),
    ("mezo-adam", "forward", None), ("mezo-adam", "stream-prefetch", None),
]  # fmt: skip

SCALED = ("hizoo", "hizoo-3", "hizoo-signs", "gv-curved", "greedy-curved")


@pytest.mark.parametrize("kind", whole.KINDS)
@pytest.mark.parametrize(("name", "place", "lr"), SAMPLE)
def test_a_sample_of_places(name: str, place: str, lr: float | None, kind: str) -> None:
    tried, wrong = whole.run(name, place, lr, kind, stride=499, first=sum(map(ord, name + place)))
    assert tried
    assert not wrong, "\n".join(wrong)


@pytest.mark.faults
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("place", whole.PLACES)
@pytest.mark.parametrize("lr", [None, 0.0], ids=["moves", "still"])
def test_every_place(name: str, place: str, lr: float | None, record_property: Any) -> None:
    """Places are taken in turn by the cases: each line of zokern's is tried in many of them."""
    if place == "forward" and name in SCALED:
        pytest.skip("refused by the constructor: its directions have full rank")
    first = list(METHODS).index(name) + 5 * list(whole.PLACES).index(place) + (lr is None)
    for kind, stride in zip(whole.KINDS, (151, 173, 83), strict=True):
        tried, wrong = whole.run(name, place, lr, kind, stride, first)
        record_property(kind, tried)
        print(f"{name} {place} {kind}: {tried} tried, {len(wrong)} wrong")
        assert not wrong, "\n".join(wrong)


def test_the_harness_sees_a_step_that_is_not_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was when AdamCounts counted after the pass."""
    from zokern.optim.mezo import MeZO

    note = MeZO.note
    monkeypatch.setattr(MeZO, "note", lambda *_: None)
    monkeypatch.setattr(MeZO, "applied", lambda self, ok: note(self, ok, whole.ledger.Ledger()))
    world = whole.World(METHODS["mezo-adam"], "shadow", None)
    world.trial("torch", -1)  # a process's first step may make more calls than the others
    total, _, _ = world.trial("torch", -1)
    verdicts = [world.trial("torch", at)[2] for at in range(total - 30, total + 31)]
    assert any("history" in one for one in verdicts)


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1, signal.SIGRTMIN + 1])
def test_every_signal_with_a_handler_waits(number: int) -> None:
    seen: list[str] = []

    def handler(number: int, frame: FrameType | None) -> None:
        seen.append("handled")

    old = signal.signal(number, handler)
    try:
        with HeldInterrupts() as held:
            signal.raise_signal(number)
            seen.append("held")
            held.release()
            seen.append("released")
            assert signal.getsignal(number) is not handler
            signal.raise_signal(number)
            held.holding = True
            held.hold()
            signal.raise_signal(number)
            seen.append("held again")
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, old)
    assert seen == ["held", "handled", "released", "handled", "held again", "handled"]


def test_what_was_held_is_delivered_before_the_next_closure() -> None:
    """A step with many forwards does not keep Ctrl-C waiting until its end."""
    opt, calls = zokern.MeZO(small(), 1e-3, num_samples=8, placement="shadow"), [0]
    run = backends.cpu.run

    def closure() -> float:
        calls[0] += 1
        return 1.0

    def interrupted(*args: Any) -> None:
        if calls[0] == 2:
            signal.raise_signal(signal.SIGINT)
        run(*args)

    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.cpu, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step(closure)
    signal.signal(signal.SIGINT, old)
    assert calls == [2]


def test_all_signals_that_were_held_are_delivered_though_one_raises() -> None:
    seen: list[int] = []

    def raising(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        raise whole.Stop(number)

    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    old = [signal.signal(number, raising) for number in numbers]
    try:
        with pytest.raises(whole.Stop), HeldInterrupts():  # noqa: PT012
            for number in numbers:
                signal.raise_signal(number)
            assert not seen
        assert seen == numbers
        assert all(signal.getsignal(number) is raising for number in numbers)
    finally:
        for number, handler in zip(numbers, old, strict=True):
            signal.signal(number, handler)


def test_a_handler_that_the_closure_sets_waits_too_and_stays() -> None:
    """And one that it puts back later, which was a stand-in, still does what it did."""
    model, first, kept = small(), [], []
    opt = zokern.MeZO(model, 1e-3, placement="shadow")

    def mine(*_: Any) -> None:
        first.append("mine")

    def theirs(*_: Any) -> None:
        first.append("theirs")

    old = signal.signal(signal.SIGUSR1, mine)
    try:

        def closure() -> float:
            kept.append(signal.signal(signal.SIGUSR1, theirs))
            return 1.0

        opt.step(closure)
        assert signal.getsignal(signal.SIGUSR1) is theirs
        assert isinstance(kept[0], Waiting)
        signal.signal(signal.SIGUSR1, kept[0])
        signal.raise_signal(signal.SIGUSR1)
        assert first == ["mine"]
        opt.step(lambda: 1.0)
        signal.raise_signal(signal.SIGUSR1)
        assert first == ["mine", "mine"]
        assert signal.getsignal(signal.SIGUSR1) is mine, "what stands in for nothing any more is taken away"
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_a_handler_that_the_closure_has_set_does_not_raise_in_the_pass_that_follows() -> None:
    model, calls = small(), [0]
    opt, run, before = zokern.MeZO(model, 0.0, placement="inplace"), backends.cpu.run, weights(model)

    def raising(*_: Any) -> None:
        raise whole.Stop

    def closure() -> float:
        calls[0] += 1
        signal.signal(signal.SIGUSR1, raising)
        return 1.0

    def interrupted(*args: Any) -> None:
        run(*args)
        if calls[0] == 1:
            signal.raise_signal(signal.SIGUSR1)

    old = signal.getsignal(signal.SIGUSR1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends.cpu, "run", interrupted)
            with pytest.raises(whole.Stop):
                opt.step(closure)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert calls == [1]
    assert opt._placement.passes.done == 3, "to one side, to the other, where it was delivered, and back"
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(before, weights(model), strict=True))


def test_signals_without_a_handler_are_left_alone() -> None:
    before = {n: signal.getsignal(n) for n in signal.valid_signals()}
    for ignored in (signal.SIG_IGN, signal.SIG_DFL):
        old = signal.signal(signal.SIGUSR2, ignored)
        with HeldInterrupts():
            assert signal.getsignal(signal.SIGUSR2) is ignored
        signal.signal(signal.SIGUSR2, old)
    assert before == {n: signal.getsignal(n) for n in signal.valid_signals()}


def test_another_thread_holds_nothing() -> None:
    seen: list[bool] = []
    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        with HeldInterrupts():
            seen.append(signal.getsignal(signal.SIGINT) is before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]


# ------------------------------------------------------------------------------------------------- passes that break off


class Broken(Exception):
    pass


@pytest.mark.parametrize("n", range(10))
def test_a_pass_that_breaks_off_between_two_launches_is_finished(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bfloat16 and float32 weights, a launch each, in place: a pass half done is neither before nor after."""

    def made() -> tuple[nn.Module, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(2)
            model = Mixed(sixteen=True)
        return model, zokern.MeZO(model, 1e-2, num_samples=2, seed=4, eps=1e-2, placement="inplace")

    twin, other = made()
    other.step(scripted([1.0, 2.0, 3.0, 5.0]))
    model, opt = made()
    before, run, calls = weights(model), backends.cpu.run, [0]

    def failing(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == n + 1:
            raise Broken
        run(*args)

    monkeypatch.setattr(backends.cpu, "run", failing)
    with pytest.raises(Broken):
        opt.step(scripted([1.0, 2.0, 3.0, 5.0]))
    monkeypatch.undo()
    if n == 9:  # the last pass had begun: it was finished
        assert equal(weights(model), weights(twin))
        assert opt.counters == other.counters
    else:
        assert opt.counters["steps"] == 0
        for a, b in zip(before, weights(model), strict=True):
            assert torch.allclose(a.float(), b.float(), atol=1e-6 if a.dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("chained", [False, True])
def test_what_broke_off_is_forgotten_by_the_next_pass(chained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights were loaded since: nobody finishes a pass over others."""
    passes = Passes(DIRECTIONS["normal"], "cpu")
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4).bfloat16())]
    swept = Sweep([Member(p, i, 0, "p") for i, p in enumerate(params)])
    numbers = PassNumbers(torch.tensor([1]), torch.zeros(1, 1, 1), torch.full((1, 1), 2.0), torch.tensor([3, 4]))
    stages = [(AXPY, numbers)]

    def double() -> None:
        passes.chain(swept, stages, RULES["axpy"]) if chained else passes.run(swept, AXPY, numbers)

    double()
    name = "run_chain" if chained else "run"
    run, calls = getattr(backends.cpu, name), [0]

    def failing(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise Broken
        run(*args)

    monkeypatch.setattr(backends.cpu, name, failing)
    with pytest.raises(Broken):
        double()
    assert passes.under_way is not None
    assert passes.begun == passes.done + 1 == 2
    with torch.no_grad():
        for p in params:
            p.fill_(5.0)
    double()
    assert passes.begun == passes.done == 2
    passes.settle()
    assert all(torch.equal(p, torch.full_like(p, 10.0)) for p in params)


@pytest.mark.parametrize("place", ["inplace", "shadow"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_dispatch_mode_that_raises(place: str, when: str, n: int) -> None:
    """Passes are then done through PyTorch's dispatcher, which may never get there."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            mine = "zokern" in str(func) and self.calls == n
            self.calls += "zokern" in str(func)
            if mine and when == "before":
                raise Broken
            result = func(*args, **(kwargs or {}))
            if mine and when == "after":
                raise Broken
            return result

    model, twin = small(), small()
    opt, other = (build(METHODS["mezo-adam"], m, placement=place) for m in (model, twin))
    other.step(scripted([1.0, 1.5]))
    before = weights(model)
    with pytest.raises(Broken), Mode():
        opt.step(scripted([1.0, 1.5]))
    if n == 2 and when == "after":
        assert equal(weights(model), weights(twin))
        assert opt.counters["steps"] == 1
        assert opt.history()[0][1] == 1.0
    else:
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(before, weights(model), strict=True))
        assert opt.counters["steps"] == 0
        assert not opt.history() or opt.history()[0][1] == 0.0
        opt.step(scripted([1.0, 1.5]))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(weights(twin), weights(model), strict=True))


def fail_from(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    calls, run = [0], sweep.run

    def failing(*args: Any) -> int:
        calls[0] += 1
        if calls[0] > n:
            raise torch.OutOfMemoryError("for the table")
        return run(*args)

    monkeypatch.setattr(sweep, "run", failing)


def test_a_restore_that_fails_is_made_up_for_by_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    opt = build(METHODS["mezo"], model, placement="inplace")
    before = weights(model)
    fail_from(monkeypatch, 1)
    with pytest.raises(torch.OutOfMemoryError):
        opt.step(scripted(given(METHODS["mezo"], 0)))
    monkeypatch.undo()
    assert not all(torch.allclose(a, b, atol=1e-3) for a, b in zip(before, weights(model), strict=True)), "perturbed"
    opt.param_groups[0]["lr"] = 0.0
    opt.step(scripted(given(METHODS["mezo"], 0)))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(before, weights(model), strict=True))
    assert opt.counters["steps"] == 1


def test_weights_that_were_loaded_after_a_failed_restore_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = small(), small(seed=3)
    opt = build(METHODS["mezo"], model, placement="inplace")
    fail_from(monkeypatch, 1)
    with pytest.raises(torch.OutOfMemoryError):
        opt.step(scripted(given(METHODS["mezo"], 0)))
    monkeypatch.undo()
    model.load_state_dict(other.state_dict())
    opt.param_groups[0]["lr"] = 0.0
    opt.step(scripted(given(METHODS["mezo"], 0)))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(weights(other), weights(model), strict=True))


@pytest.mark.parametrize("place", whole.PLACES)
def test_a_warning_that_is_an_error_leaves_a_step_that_is_done(place: str) -> None:
    model = small()
    opt = build(METHODS["mezo-adam"], model, **whole.PLACES[place])

    def closure() -> float:
        model()
        return float("nan")

    with pytest.raises(zokern.ZokernWarning):
        opt.step(closure)
    assert (opt.counters["steps"], opt.skipped_steps) == (1, 1)
    opt.step(closure)
    assert (opt.counters["steps"], opt.skipped_steps) == (2, 2)


def test_what_a_method_does_after_its_last_pass_may_fail() -> None:
    class Failing(zokern.MeZO):
        def applied(self, ok: torch.Tensor) -> None:
            assert self.metrics["loss"] == 1.5
            raise Broken

    opt = Failing(small(), 1e-3)
    with pytest.raises(Broken):
        opt.step(scripted([1.0, 2.0]))
    assert opt.counters["steps"] == 1


def test_every_listener_is_told_though_one_raises() -> None:
    opt, told = zokern.MeZO(small(), 1e-3), []

    def failing(event: Any) -> None:
        told.append("failing")
        raise Broken

    opt.listeners += [failing, lambda event: told.append(event.step)]
    for step in range(2):
        with pytest.raises(Broken):
            opt.step(lambda: 1.0)
        assert told[-2:] == ["failing", step]


# ------------------------------------------------------------------------------------------------------ one at a time


@pytest.mark.parametrize("place", whole.PLACES)
@pytest.mark.parametrize("what", ["step", "step in its batches", "load_state_dict", "add_param_group", "of another"])
def test_inside_a_step(place: str, what: str) -> None:
    model = small()
    opt = build(METHODS["mezo"], model, **whole.PLACES[place])
    other = zokern.MeZO([nn.Parameter(torch.ones(3))], 1e-3)
    state, before, said = opt.state_dict(), weights(model), []

    def closure() -> Any:
        loss = model()
        try:
            {
                "step": lambda: opt.step(model),
                "step in its batches": lambda: opt.step(lambda b: model(), [1, 2]),
                "load_state_dict": lambda: opt.load_state_dict(state),
                "add_param_group": lambda: opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
                "of another": lambda: other.step(lambda: 1.0),
            }[what]()
        except RuntimeError as error:
            said.append(str(error))
        return loss

    opt.param_groups[0]["lr"] = 0.0
    opt.step(closure)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(before, weights(model), strict=True))
    assert len(opt.param_groups) == 1
    if what == "of another":
        assert not said
        assert other.counters["steps"] == 4
    else:
        assert len(said) == 4
        assert said[0].startswith(f"{what.split()[0]} was called inside a step of the same optimizer")
    opt.step(lambda: model())


def test_two_threads() -> None:
    model = small()
    opt = zokern.MeZO(model, 0.0, placement="inplace")
    before, said, inside, done = weights(model), [], threading.Event(), threading.Event()

    def closure() -> float:
        inside.set()
        done.wait(10)
        return 1.0

    def work() -> None:
        inside.wait(10)
        try:
            opt.step(lambda: 1.0)
        except RuntimeError as error:
            said.append(str(error))
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    opt.step(closure)
    thread.join()
    assert "another thread is in a step of the same optimizer" in said[0]
    assert opt.counters["steps"] == 1
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(before, weights(model), strict=True))
    work()
    assert opt.counters["steps"] == 2


def test_operators_are_those_that_are_tested() -> None:
    assert operators._done_by == [sweep.launch]


@pytest.mark.parametrize(("name", "place"), [("mezo-adam", "stream-pipelined"), ("helene", "shadow-pipelined")])
def test_a_chain_that_breaks_off_after_its_last_launch_was_done(
    name: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is noted: the step is whole all the same."""
    world, note, calls = whole.World(METHODS[name], place, 0.0), Passes._note, [0]
    world.reset()

    def breaks_off(self: Passes, *one: Any) -> None:
        calls[0] += 1
        if calls[0] == last:
            raise whole.Stop
        note(self, *one)

    last = -1
    with monkeypatch.context() as patch:
        patch.setattr(Passes, "_note", breaks_off)
        world.step(1)
        last, calls[0] = calls[0], 0
        assert last > 0
        world.reset()
        with pytest.raises(whole.Stop):
            world.step(1)
    assert not world.verdict()
