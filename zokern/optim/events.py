"""What a step tells those who listen: one frozen event, after its last pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from zokern.passes.spec import PassNumbers, PassSpec


@dataclass(frozen=True)
class StepEvent:
    """One step, done, skipped or broken off by an exception. Its numbers are where the step had them: to read one that is
    on a device is to wait.

    step: its number, from 0. ok: whether its update did anything, 0-d; None if it was broken off. passes: those that wrote
    to the weights' own storage, in order. drawn: the step's directions by seed, as far as the host knows them. loss: 0-d,
    None if it was broken off. lrs: each group's, a number, or 0-d where a device has it. memory: what the method needs
    again in later steps, likewise. layout: what a replay has to know of the parameters; the same object while nothing has
    changed. deferred: `passes` was not done, but waits to be folded into the weights. row: of a captured step, what all of
    its tensors hold (told.py): they themselves are the next launch's, soon.
    """

    step: int
    ok: Tensor | None
    passes: tuple[tuple[PassSpec, PassNumbers], ...]
    drawn: Mapping[int, int]
    loss: Tensor | None
    lrs: tuple[float | Tensor, ...]
    memory: tuple[float | Tensor, ...]
    layout: Mapping[str, Any]
    deferred: bool = False
    row: Tensor | None = None


Listener = Callable[[StepEvent], None]


@runtime_checkable
class Careful(Protocol):
    """A listener that may refuse what it could not go on after: what it raises, is raised before anything is changed."""

    def __call__(self, event: StepEvent) -> None: ...

    def before_step(self) -> None:
        """A step is about to begin."""

    def before_load(self, same: bool) -> None:
        """A state_dict is about to be loaded; same: it is what the optimizer has."""


@runtime_checkable
class HearsFolds(Protocol):
    """A listener that is told of folds between steps."""

    def folded(self, event: StepEvent) -> None:
        """A fold by hand; step: the last one that was done, passes: the fold's."""


@runtime_checkable
class FallsBehind(Protocol):
    """A listener that does later what it is told of, and all of it when asked."""

    def flush(self) -> None:
        """Everything up to now; waits for the device."""
