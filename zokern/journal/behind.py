"""Steps whose numbers are still on a device: copied out in blocks, without waiting, and written down when they are here.

What a step has told stays on its device until some steps are together; these become one vector there, which is copied to
the host in the order of the device's work. Later steps look whether it has come. Only where the file would fall behind by
more than it may does a step wait.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from zokern._checks import ZokernWarning
from zokern.optim.arriving import Arriving
from zokern.optim.events import StepEvent
from zokern.optim.told import Numbers, Together, Vector

LAG = 32  # steps
PARTS = 2  # blocks that are under way at most: the device has work while one of them is waited for
STEPS = 64  # that may be under way besides, where lag is in seconds
MOST = 16  # in a block


def check_lag(lag: Any) -> int | float:
    """
    Raises:
        TypeError, ValueError: for anything but a whole number of steps or a number of seconds, from 0.
    """
    if isinstance(lag, bool) or not isinstance(lag, int | float):
        raise TypeError(f"lag must be a whole number of steps or a float of seconds, got {type(lag).__name__}")
    if not 0 <= lag < math.inf:
        raise ValueError(f"lag is {lag}; it must be a whole number of steps or a float of seconds, from 0")
    return lag


class Entry(NamedTuple):
    """A step, or a fold, that is to be written."""

    event: StepEvent
    kind: int
    since: float


class Block(NamedTuple):
    """Steps whose numbers are on their way; row None: there are none to wait for."""

    entries: list[Entry]
    together: Together
    row: Arriving | None


class Arrived(NamedTuple):
    """Steps whose numbers are here."""

    entries: list[Entry]
    together: Together
    vectors: dict[Vector, Numbers]


class Behind:
    """lag: how many steps (int), or for how many seconds (float), what is written may be behind what is done; 0 makes each
    step wait. waits: steps that had to. An entry is in `open` until it is sent, in `sent` until it is taken."""

    def __init__(self, lag: int | float = LAG) -> None:
        self.lag, self.waits = lag, 0
        self.steps = lag if isinstance(lag, int) else STEPS
        self.seconds = math.inf if isinstance(lag, int) else lag
        self.block = max(1, min(self.steps // PARTS, MOST))
        self.open: list[Entry] = []
        self.sent: deque[Block] = deque()
        self.told = False

    def __len__(self) -> int:
        return len(self.open) + sum(len(block.entries) for block in self.sent)

    @property
    def first(self) -> Entry | None:
        """The oldest."""
        entries = self.sent[0].entries if self.sent else self.open
        return entries[0] if entries else None

    def put(self, event: StepEvent, kind: int) -> None:
        now = time.monotonic()
        self.open.append(Entry(event, kind, now))
        if len(self.open) >= self.block or now - self.open[0].since >= self.seconds / PARTS:
            self._send()

    def _send(self) -> None:
        """Starts the copy of what is together."""
        if self.open:
            together = Together([entry.event for entry in self.open])
            there = together.far()
            self.sent.append(Block(self.open, together, None if there is None else Arriving(there)))
            self.open = []

    def late(self) -> bool:
        """Whether more is outstanding than may be."""
        first = self.first
        return first is not None and (len(self) > self.steps or time.monotonic() - first.since > self.seconds)

    def take(self, write: Callable[[Arrived], None], *, wait: bool) -> None:
        """Has all written whose numbers are here, in order, and keeps it no longer. wait: for the oldest block."""
        if wait and not self.sent:
            self._send()
        while self.sent:
            entries, together, row = self.sent[0]
            far = None
            if row is not None:
                far = row.wait() if wait else row.here()
                if far is None:
                    return
            wait = False
            vectors = together.vectors(far)
            self.sent.popleft()
            write(Arrived(entries, together, vectors))

    def wait(self, write: Callable[[Arrived], None]) -> None:
        """For the oldest, in a step. Where the device has nothing left to do then, that has cost time, and is told once."""
        self.waits += 1
        self.take(write, wait=True)
        if self.lag and not self.told and not self.sent:
            self.told = True
            warnings.warn(
                f"a step had to wait until the journal had the steps before it, and the device had nothing to do then: "
                f"lag is {self.lag!r}; give a larger one",
                ZokernWarning,
                stacklevel=6,
            )

    def clear(self) -> None:
        """Gives up what is kept."""
        self.open = []
        self.sent.clear()
