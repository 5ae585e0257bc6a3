"""What a step's last pass has to agree with: counters, skips, what a method remembers, metrics.

It is written down before the pass, where everything that can fail still leaves the step undone, and taken back if the pass
is never launched. Once a launch has been made nothing is left to do but to assign. So whatever is raised, and wherever, a
step is whole or was not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from zokern.passes.spec import PassNumbers, PassSpec
from zokern.sweep import Passes


class Ledger:
    """Of one step. ok: 0-d bool, whether its update does anything; None until the last pass is about to be launched, when
    `before` passes were done. returned: the last pass was made. metrics: of the step. memory: what a journal needs of it;
    None where that is known only after the pass. deferred: the update, where it waits to be folded (folding.py).
    """

    ok: Tensor | None = None
    before = 0
    returned = False
    metrics: Mapping[str, Tensor] = {}
    memory: tuple[float | Tensor, ...] | None = None
    deferred: tuple[PassSpec, PassNumbers] | None = None
    _undo: tuple[tuple[Any, ...], ...] = ()  # functions with their arguments

    def undo(self, take_back: Callable[[], object]) -> None:
        """What takes back a change that is about to be made; called twice, or without the change, it does no harm."""
        self._undo = (*self._undo, (take_back,))

    def add(self, count: Tensor, by: Tensor) -> None:
        """Counts, in place: a captured step goes on working on the same tensor."""
        self._undo = (*self._undo, (_take_off, count.add_(by), by))  # nothing comes between the two

    def settle(self, passes: Passes) -> bool:
        """Whether the step was done; where it was not, what was written down is taken back."""
        if self.ok is not None and (self.returned or passes.begun != self.before):
            return True
        self.ok = None
        while self._undo:
            take_back, *arguments = self._undo[-1]
            take_back(*arguments)
            self._undo = self._undo[:-1]
        return False


def _take_off(count: Tensor, by: Tensor) -> None:
    count.sub_(by.to(count.dtype))
