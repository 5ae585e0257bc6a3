"""Breaks a step off wherever it can break, and looks whether it is whole or was not.

A trial puts an optimizer back to where it was after its first step, does the second with one exception in it, and compares
weights, states, counters, skips, memory and the module with those before that step and those after it: one of the two has
to be had, all through. Then it does a step more, which has to be the one that follows.

Three kinds of trial:

    signal  SIGTERM, whose handler raises, as zokern begins its line number k: any line
    line    an exception there, outside CRITICAL
    torch   an exception instead of torch's call number k, outside RECOVERY
"""

from __future__ import annotations

import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import zokern
from tests.methods import EPS, METHODS, SEED, Case, build, given
from tests.models import small
from zokern.optim import base, ledger, losses
from zokern.placement.forward import Forward
from zokern.placement.inplace import InPlace
from zokern.placement.prefetched import Prefetched
from zokern.placement.shadow import Shadow
from zokern.placement.stream import Stream
from zokern.sweep import Passes

ROOT = str(Path(zokern.__file__).parent)
PLACES: dict[str, dict[str, Any]] = {
    "inplace": {"placement": "inplace"},
    "shadow": {"placement": "shadow"},
    "stream": {"placement": "stream"},
    "forward": {"placement": "forward", "distribution": zokern.LowRank(1)},
    "shadow-pipelined": {"placement": "shadow", "pipelined": True},
    "stream-pipelined": {"placement": "stream", "pipelined": True},
    "stream-prefetch": {"placement": "stream", "prefetch": True},
}
KINDS = ("signal", "line", "torch")


class Stop(Exception):
    """From the test."""


def _codes(*functions: Any) -> frozenset[CodeType]:
    return frozenset(inspect.unwrap(f).__code__ for f in functions)


# What puts everything right after an exception: it relies on torch, and nothing interrupts it, since signals are held.
RECOVERY = _codes(
    InPlace.end, Shadow.end, Forward.end, Stream.end, Prefetched.end, Passes.settle, ledger.Ledger.settle, ledger._take_off,
)  # fmt: skip
# The lines between a launch and its note, and those that hold and let go: a signal waits there, and nothing else can raise.
CRITICAL = RECOVERY | _codes(
    base.ZerothOrderOptimizer.step, base.ZerothOrderOptimizer._step,
    base.ZerothOrderOptimizer._evaluate_and_update, Passes.run, Passes.chain, zokern.sweep.launch, zokern.sweep.run_chain,
    ledger.Ledger.add, losses.Skips.warn,
)  # fmt: skip
NEVER = ("interrupts.py", "turn.py")


def _within(frame: FrameType | None, codes: frozenset[CodeType]) -> bool:
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


class AtLine:
    """Calls `act` as zokern starts its line number `at`; counts them. critical: also in CRITICAL and NEVER."""

    def __init__(self, at: int, act: Callable[[], None], critical: bool) -> None:
        self.at, self.act, self.critical = at, act, critical
        self.count, self.where = 0, ""
        self._last: tuple[CodeType, int] | None = None
        self._recovering: FrameType | None = None

    def _call(self, frame: FrameType, event: str, _: object) -> Any:
        path = frame.f_code.co_filename
        if not path.startswith(ROOT) or self._recovering is not None:
            return None
        if self.critical:
            return self._line
        if frame.f_code in RECOVERY:
            self._recovering = frame
            return self._until_it_returns
        return None if frame.f_code in CRITICAL or path.endswith(NEVER) else self._line

    def _until_it_returns(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "return":
            self._recovering = None
        return self._until_it_returns

    def _line(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            here = (frame.f_code, frame.f_lineno)
            if here != self._last:  # once for a comprehension
                self._last = here
                self.count += 1
                if self.count == self.at:
                    self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                    sys.settrace(None)
                    self.act()
                    return None
        return self._line

    def __enter__(self) -> AtLine:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


class AtCall(TorchFunctionMode):
    """Raises instead of torch's call number `at`; counts them. Those that take no tensor are called through `also`."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count, self.where, self.on = at, 0, "", True

    def meets(self, name: str) -> None:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and not frame.f_code.co_filename.startswith(ROOT):  # a call of the closure's is its own
            if frame.f_code.co_name == "closure":
                return
            frame = frame.f_back
        if frame is not None and self.on and not _within(frame, RECOVERY):
            self.count += 1
            if self.count == self.at:
                self.where, self.on = f"{name} in {Path(frame.f_code.co_filename).name}:{frame.f_lineno}", False
                raise Stop("torch")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.meets(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@contextmanager
def also(mode: AtCall) -> Iterator[None]:
    """The calls that no mode sees."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "clear_autocast_cache"), (torch, "get_num_threads"), (torch.autograd.graph, "increment_version"),
        ):  # fmt: skip
            original = getattr(owner, name)

            def call(*args: Any, _name: str = name, _original: Any = original) -> Any:
                mode.meets(_name)
                return _original(*args)

            patch.setattr(owner, name, call)
        yield


@dataclass
class Seen:
    """All that a step changes."""

    weights: list[Tensor]
    rest: dict[str, Any] = field(default_factory=dict)

    def is_at(self, other: Seen, exact: bool) -> str:
        """What differs; "" for nothing."""
        for i, (a, b) in enumerate(zip(self.weights, other.weights, strict=True)):
            same = torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-5, atol=1e-6)
            if not same:
                return f"weight {i} is off by {float((a - b).abs().max()):.2g}"
        return next((name for name, value in self.rest.items() if not _same(value, other.rest[name])), "")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)


class World:
    """An optimizer at its second step, again and again."""

    def __init__(self, case: Case, place: str, lr: float | None) -> None:
        self.case, self.place = case, place
        self.exact = not place.startswith("inplace")
        self.model = small()
        self.opt = build(case, self.model, **PLACES[place])
        if lr is not None:
            self.opt.param_groups[0]["lr"] = lr
        self.params = list(self.model.parameters())
        self.entries = [(m, n, p) for m in self.model.modules() for n, p in m._parameters.items()]
        self.hooks = self._hooks()
        self.step(0)
        self.saved, self.start = self.opt.state_dict(), self.seen()
        copies = {i: {n: t.clone() for n, t in own.items()} for i, own in self.saved["state"].items()}
        self.saved = {**self.saved, "state": copies}
        self.step(1)
        self.after = self.seen()
        self.step(2)
        self.after2 = self.seen()
        self.reset()
        self.step(1)
        assert not self.seen().is_at(self.after, True)

    def _hooks(self) -> list[int]:
        return [
            len(v) for m in self.model.modules() for k, v in vars(m).items() if "hooks" in k and isinstance(v, dict)
        ]

    def step(self, t: int) -> None:
        losses = iter(given(self.case, t))

        def closure() -> Tensor:
            if self.place.startswith(("stream", "forward")):
                self.model()
            return torch.tensor(next(losses), dtype=torch.float64)

        self.opt.step(closure)

    def seen(self) -> Seen:
        own = [{n: t.clone() for n, t in self.opt.state[p].items()} if p in self.opt.state else {} for p in self.params]
        return Seen(
            [p.detach().clone() for p in self.params],
            {
                "states": own,
                "steps": self.opt.counters["steps"],  # the other counters are of work, done for nothing or not
                "skipped": self.opt.skipped_steps,
                "history": self.opt.history(),
                "entries": [m._parameters[n] is p for m, n, p in self.entries],
                "hooks": self._hooks(),
            },
        )

    def reset(self) -> None:
        with torch.no_grad():
            for p, value in zip(self.params, self.start.weights, strict=True):
                p.copy_(value)
        self.opt.load_state_dict(self.saved)

    def verdict(self) -> str:
        """Of the step that was broken off, and of the one after it."""
        now = self.seen()
        if not (after := now.is_at(self.after, True)) or (not self.exact and not now.is_at(self.after, False)):
            then = 2, self.after2
        elif not (before := now.is_at(self.start, self.exact)):
            then = 1, self.after
        else:
            return f"neither before ({before}) nor after ({after})"
        try:
            self.step(then[0])
        except Exception as error:
            return f"the next step fails: {error!r}"
        wrong = self.seen().is_at(then[1], self.exact)
        return f"the next step is another: {wrong}" if wrong else ""

    def trial(self, kind: str, at: int) -> tuple[int, str, str]:
        """The number of places of this kind, where this one was, and what is wrong."""
        self.reset()
        if kind == "torch":
            mode = AtCall(at)
            try:
                with also(mode), mode:
                    self.step(1)
            except Stop:
                pass
            return mode.count, mode.where, self.verdict()
        if kind == "signal":
            act: Callable[[], None] = lambda: signal.raise_signal(signal.SIGTERM)  # noqa: E731
        else:
            act = _stop
        lines = AtLine(at, act, critical=kind == "signal")
        try:
            with lines:
                self.step(1)
        except Stop:
            pass
        return lines.count, lines.where, self.verdict()


def _stop(*_: Any) -> None:
    raise Stop("from the test")


@contextmanager
def terminated() -> Iterator[None]:
    """SIGTERM raises Stop."""
    old = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        assert signal.getsignal(signal.SIGTERM) is _stop, "a step left another handler behind"
        signal.signal(signal.SIGTERM, old)


def worlds() -> list[tuple[str, str, float | None]]:
    """Every method, placement, and learning rate: the case's own (None), and 0."""
    return [(name, place, lr) for name in METHODS for place in PLACES for lr in (None, 0.0)]


def run(name: str, place: str, lr: float | None, kind: str, stride: int, first: int) -> tuple[int, list[str]]:
    """Every stride-th place of one kind, from `first` on; how many were tried, and what went wrong."""
    wrong, tried = [], 0
    with terminated():
        world = World(METHODS[name], place, lr)
        total, _, _ = world.trial(kind, -1)
        for at in range(1 + first % stride, total + 1, stride):
            _, where, verdict = world.trial(kind, at)
            tried += 1
            if verdict:
                wrong.append(f"{name}, {place}, lr {lr}: {kind} {at} of {total}, {where}: {verdict}")
                world = World(METHODS[name], place, lr)
    return tried, wrong


__all__ = ["EPS", "SEED"]
