"""What a step's last pass has to agree with: counters, skips, what a method remembers, metrics.

It is written down before the pass, where everything that can fail still leaves the step undone, and taken back if the pass
is never launched. Once a launch has been made nothing is left to do but to assign. So whatever is raised, and wherever, a
step is whole or was not.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from zokern.sweep import Passes


class Ledger:
    """Of one step. ok: 0-d bool, whether its update does anything; None until the last pass is about to be launched.
    metrics: of the step. memory: what a journal needs of it; None where that is known only after the pass.
    """

    def __init__(self, passes: Passes) -> None:
        self.ok: Tensor | None = None
        self.metrics: dict[str, Tensor] = {}
        self.memory: tuple[float, ...] | None = None
        self._passes = passes
        self._before = 0  # passes that were begun when the last one was about to be
        self._returned = False
        self._undo: list[Callable[[], object]] = []

    def undo(self, take_back: Callable[[], object]) -> None:
        """What takes back a change that is about to be made; called twice, or without the change, it does no harm."""
        self._undo.append(take_back)

    def add(self, count: Tensor, by: Tensor) -> None:
        """Counts, in place: a captured step goes on working on the same tensor."""
        self._undo.append(_Added(count.add_(by), by))

    def begin(self, ok: Tensor) -> None:
        """All is written down; the last pass comes now."""
        self._before, self.ok = self._passes.begun, ok

    def end(self) -> None:
        """The last pass was made."""
        self._returned = True

    @property
    def done(self) -> bool:
        return self.ok is not None and (self._returned or self._passes.begun != self._before)

    def settle(self) -> bool:
        """Whether the step was done; where it was not, what was written down is taken back."""
        if self.done:
            return True
        self.ok = None
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        return False


class _Added:
    def __init__(self, count: Tensor, by: Tensor) -> None:
        self.count, self.by = count, by

    def __call__(self) -> None:
        self.count.sub_(self.by.to(self.count.dtype))
