"""Where the time of a step goes: forwards (the closure), passes over the weights, and everything else.

    step = forwards + passes + other

A pass that runs inside the closure, as those of placement="stream" do, counts as a pass. Timed by zokern.finetune.clock:
on CUDA with events that are read when the steps are over, so nothing waits for the device that would not otherwise; there
"other" has the time in which the device waits for the host. What runs on a side stream beside a forward, as the passes of
prefetch=True do on CUDA, has no time of its own: what it costs is in the forward, which it slows down. Inside a CUDA graph
there is no telling forwards from passes: of a graphed step only the whole is timed.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from zokern import journal
from zokern.bench.models import Work
from zokern.bench.timing import spread
from zokern.finetune.clock import Clock
from zokern.graphs import step as graphed
from zokern.optim import ZerothOrderOptimizer

PARTS = ("forwards", "passes", "other")


class Stepper(Protocol):
    """An optimizer of zokern, by itself or graphed, or a peer."""

    @property
    def counters(self) -> Mapping[str, int]: ...
    @property
    def step(self) -> Callable[[Callable[[], Tensor]], Tensor]: ...


class NotCaptured(RuntimeError):
    """The step could not be captured, for a reason that is not memory."""


class Graphed:
    """An optimizer whose steps are captured at the first one, and replayed as one CUDA graph.

    The batch lies on the device, and a step copies it into the graph's own, as a loop over batches would.
    """

    WARM_UP = 2  # steps: HELENE's second is of another kind than its first, and is captured when it comes

    def __init__(self, optimizer: ZerothOrderOptimizer) -> None:
        self.optimizer = optimizer
        self._graph: graphed.GraphedStep | None = None

    @property
    def counters(self) -> Mapping[str, int]:
        return self.optimizer.counters

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step on the closure's batch; the closure must be the same each time."""
        work = _work(closure)
        if self._graph is None:
            try:
                self._graph = graphed.GraphedStep(self.optimizer, work.loss, work.batch)
            except RuntimeError as error:
                if isinstance(error.__cause__, torch.OutOfMemoryError):
                    raise error.__cause__ from error
                raise NotCaptured(str(error)) from error
        return self._graph(work.batch)


class Together:
    """An optimizer whose steps evaluate all probes of a round in one forward. It gives one closure, whoever times it: what
    a first step has tested holds for the next ones."""

    def __init__(self, optimizer: ZerothOrderOptimizer) -> None:
        self.optimizer = optimizer
        self._now: Work | None = None

    @property
    def counters(self) -> Mapping[str, int]:
        return self.optimizer.counters

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        self._now = _work(closure)
        loss: Tensor = self.optimizer.step(self._each, [self._now.batch], batched=True)
        return loss

    def _each(self, batch: Mapping[str, Tensor]) -> Tensor:
        assert self._now is not None
        return self._now.each(batch)


class Journalled:
    """A stepper whose optimizer writes a journal, to a temporary file, from the first step until it is let go."""

    def __init__(self, inner: Stepper, optimizer: ZerothOrderOptimizer) -> None:
        self.inner, self.optimizer = inner, optimizer
        self._begun: contextlib.ExitStack | None = None

    @property
    def counters(self) -> Mapping[str, int]:
        return self.inner.counters

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        if self._begun is None:
            self._begun = contextlib.ExitStack()
            folder = self._begun.enter_context(tempfile.TemporaryDirectory())
            self._begun.enter_context(journal.write(self.optimizer, Path(folder) / "run.zkj"))
            weakref.finalize(self, self._begun.close)
        return self.inner.step(closure)


def is_graphed(stepper: Stepper) -> bool:
    return isinstance(stepper.inner if isinstance(stepper, Journalled) else stepper, Graphed)


def _work(closure: Callable[[], Tensor]) -> Work:
    if not isinstance(closure, Work):
        raise TypeError(f"closure must be a zokern.bench.models.Work, got {type(closure).__name__}")
    return closure


def why_not_graphed(optimizer: ZerothOrderOptimizer, device: torch.device) -> str | None:
    """What keeps a method's steps from being graphed on `device`."""
    if device.type not in graphed.SUPPORTED:
        return f"it replays a CUDA graph, and this run is on {'a CPU' if device.type == 'cpu' else device}"
    return optimizer.why_not_graphed()


@contextlib.contextmanager
def _around_passes(stepper: Stepper, around: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """While the block runs, each pass of `stepper` runs in a context of its own; a graph's passes are out of reach."""

    def timed(work: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(work)
        def call(*args: Any, **kwargs: Any) -> None:
            with around():
                work(*args, **kwargs)

        return call

    # Placements hold the optimizer's passes: an attribute of them reaches every one.
    inner = stepper.inner if isinstance(stepper, Journalled) else stepper
    inner = inner.optimizer if isinstance(inner, Together) else inner
    owner = inner._passes if isinstance(inner, ZerothOrderOptimizer) else inner
    both = {name: timed(getattr(owner, name)) for name in ("run", "chain", "pass_") if hasattr(owner, name)}
    vars(owner).update(both)
    try:
        yield
    finally:
        for name in both:
            del vars(owner)[name]


def measure(stepper: Stepper, closure: Callable[[], Tensor], device: torch.device, steps: int) -> dict[str, float]:
    """Seconds of one step, the mean of `steps` in a row: "step" and its PARTS, which a step in one graph has not."""
    clock, inside = Clock(device), False

    def timed(evaluated: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(*batch: Any) -> Tensor:
            nonlocal inside
            inside = True
            try:
                with clock.measure("closure"):
                    return evaluated(*batch)
            finally:
                inside = False

        return forward

    forward: Callable[[], Tensor] = timed(closure)
    if isinstance(closure, Work):
        forward = replace(closure, loss=timed(closure.loss), each=timed(closure.each))
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what was queued before is not ours
    home = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def around() -> contextlib.AbstractContextManager[None]:
        if home is not None and torch.cuda.current_stream(device) != home:
            return contextlib.nullcontext()
        return clock.measure("passes in it" if inside else "passes")

    whole = is_graphed(stepper)
    with _around_passes(stepper, around), clock.measure("step"):
        for _ in range(steps):
            stepper.step(closure if whole else forward)
    seconds = {name: total / steps for name, total in clock.seconds().items()}
    step, nested = seconds["step"], seconds.get("passes in it", 0.0)
    if whole:
        return {"step": step}
    forwards, passes = seconds.get("closure", 0.0) - nested, seconds.get("passes", 0.0) + nested
    return {"step": step, "forwards": forwards, "passes": passes, "other": step - forwards - passes}


def summary(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The median step and its parts: those of the round that has it (of two middle rounds, the faster), so that they
    add up."""
    steps = [r["step"] for r in rounds]
    median = statistics.median_low(steps)
    chosen = rounds[steps.index(median)]
    return {"step": spread(steps) | {"median": median}, **{part: chosen[part] for part in PARTS if part in chosen}}


def counted(stepper: Stepper, before: Mapping[str, int]) -> dict[str, float]:
    """Passes and forwards of a step since the counters were `before`."""
    now = stepper.counters
    steps = now["steps"] - before["steps"]
    return {f"{name}_per_step": (now[name] - before[name]) / steps for name in ("passes", "forwards")}
