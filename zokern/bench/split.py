"""Where the time of a step goes: forwards (the closure), passes over the weights, and everything else.

    step = forwards + passes + other

A pass that runs inside the closure, as those of placement="stream" do, counts as a pass. Timed by zokern.finetune.clock:
on CUDA with events that are read when the steps are over, so nothing waits for the device that would not otherwise; there
"other" has the time in which the device waits for the host.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from zokern.bench.step_graphed import Graphed
from zokern.bench.step_peers import Peer
from zokern.finetune.clock import Clock
from zokern.optim import ZerothOrderOptimizer

PARTS = ("forwards", "passes", "other")


class Stepper(Protocol):
    """An optimizer of zokern, by itself or graphed, or a peer."""

    @property
    def counters(self) -> Mapping[str, int]: ...
    @property
    def step(self) -> Callable[[Callable[[], Tensor]], Tensor]: ...


@contextlib.contextmanager
def _around_passes(stepper: Stepper, around: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """While the block runs, each pass of `stepper` runs in a context of its own."""
    if isinstance(stepper, Peer):
        before, stepper.around = stepper.around, around
        try:
            yield
        finally:
            stepper.around = before
        return
    assert isinstance(stepper, ZerothOrderOptimizer)
    passes = stepper._passes  # placements hold the same object: an attribute of it reaches every pass

    def timed(work: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(work)
        def call(*args: Any, **kwargs: Any) -> None:
            with around():
                work(*args, **kwargs)

        return call

    both = {"run": timed(passes.run), "chain": timed(passes.chain)}
    vars(passes).update(both)
    try:
        yield
    finally:
        for name in both:
            del vars(passes)[name]


def measure(stepper: Stepper, closure: Callable[[], Tensor], device: torch.device, steps: int) -> dict[str, float]:
    """Seconds of one step, the mean of `steps` in a row: "step" and its PARTS, which a step in one graph has not."""
    clock, inside = Clock(device), False

    def forward() -> Tensor:
        nonlocal inside
        inside = True
        try:
            with clock.measure("closure"):
                return closure()
        finally:
            inside = False

    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what was queued before is not ours
    if isinstance(stepper, Graphed):
        with clock.measure("step"):
            for _ in range(steps):
                stepper.step(closure)
        return {"step": clock.seconds()["step"] / steps}
    with _around_passes(stepper, lambda: clock.measure("passes in it" if inside else "passes")), clock.measure("step"):
        for _ in range(steps):
            stepper.step(forward)
    seconds = {name: total / steps for name, total in clock.seconds().items()}
    nested = seconds.get("passes in it", 0.0)
    forwards, passes = seconds.get("closure", 0.0) - nested, seconds.get("passes", 0.0) + nested
    step = seconds["step"]
    return {"step": step, "forwards": forwards, "passes": passes, "other": step - forwards - passes}


def summary(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The median step and its parts: those of the round that has it (of two middle rounds, the faster), so that they
    add up."""
    steps = [r["step"] for r in rounds]
    median = statistics.median_low(steps)
    chosen = rounds[steps.index(median)]
    spread = {"median": median, "min": min(steps), "max": max(steps), "rounds": len(steps)}
    return {"step": spread, **{part: chosen[part] for part in PARTS if part in chosen}}


def counted(stepper: Stepper, before: Mapping[str, int]) -> dict[str, float]:
    """Passes and forwards of a step since the counters were `before`."""
    now = stepper.counters
    steps = now["steps"] - before["steps"]
    return {f"{name}_per_step": (now[name] - before[name]) / steps for name in ("passes", "forwards")}
