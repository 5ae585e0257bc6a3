"""Runs groups of threads that are at the same place of a program: PTX's threads, AMD's waves.

The group that is furthest back runs first, so that threads that went different ways meet again. A barrier opens when all
threads that are left wait.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from .faults import Report
from .memory import Memory
from .parse import PtxError

STEPS = 2_000_000  # of a group: more than any kernel here takes


class Groups(Memory, ABC):
    """What is left to a machine: the program, how groups begin, meet, run a block, and part at its end.

    Of a group: `at`, the block of the program that is next; `threads`, their numbers, counted over all blocks; `waiting`,
    at a barrier.
    """

    program: Any
    kernel: Any

    @abstractmethod
    def begin(self) -> Any:
        """The group of all threads."""

    @abstractmethod
    def together(self, groups: list[Any]) -> Any:
        """One group of several at the same place."""

    @abstractmethod
    def run_block(self, group: Any) -> None:
        """The block where it is, without its end."""

    @abstractmethod
    def following(self, group: Any, alive: Any) -> list[Any]:
        """Where a group goes from the end of its block; `alive` of threads that end becomes False."""

    def run(self, limit: int = STEPS) -> Report:
        program, report = self.program, self.report
        alive = np.ones(self.grid * self.block, bool)
        groups = [self.begin()]
        with np.errstate(all="ignore"):
            while groups:
                ready = [g for g in groups if not g.waiting]
                if not ready:
                    self._open_barriers(groups, alive)
                    continue
                at = min(g.at for g in ready)
                group = self.together([g for g in ready if g.at == at])
                groups = [g for g in groups if g.waiting or g.at != at]
                report.runs[at] += len(group.threads)
                report.steps += program.sizes[at]
                report.instructions += program.sizes[at] * len(group.threads)
                if report.steps > limit:
                    raise PtxError(f"{self.kernel.name} does not end")
                self.run_block(group)
                groups += self.following(group, alive)
        self.write_back()
        return report

    def _open_barriers(self, groups: list[Any], alive: Any) -> None:
        """All threads that are left wait: the barrier of every block opens."""
        places: dict[int, int] = {}
        for g in groups:
            for b in np.unique(g.threads // self.block).tolist():
                if places.setdefault(b, g.at) != g.at:
                    self.report.fault("barrier", "threads of one block wait at different barriers", 1, f"block {b}")
        living = alive.reshape(self.grid, self.block).sum(1)
        partial = (living > 0) & (living < self.block)
        if partial.any():
            which = f"block {int(np.flatnonzero(partial)[0])}"
            self.report.fault("barrier", "some threads of a block have left before it", partial.sum(), which)
        self.races.barriers += np.int32(1)
        for g in groups:
            g.waiting = False
