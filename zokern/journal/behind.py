"""Steps whose numbers are still on a device: copied out in blocks, without waiting, and written down when they are here.

What a step has told stays on its device until some steps are together; these become one row there, which is copied to the
host in the order of the device's work. Later steps look whether it has come. Only where the file would fall behind by more
than it may does a step wait.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zokern._checks import ZokernWarning
from zokern.optim import told
from zokern.optim.arriving import Arriving
from zokern.optim.events import ROWS, StepEvent

LAG = 32  # steps
PARTS = 4  # blocks that are under way at most: the device has work while one of them is waited for
SECONDS_STEPS = ROWS  # of a lag in seconds: steps that may be under way besides


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


@dataclass
class Entry:
    """A step, or a fold, that is to be written. row: what its row is made of; nothing: it can be written as it is."""

    event: StepEvent
    kind: int
    row: list[Tensor]
    since: float


@dataclass
class Block:
    """Steps whose numbers are on their way in one row; None where there are none to wait for."""

    entries: list[Entry]
    row: Arriving | None


class Behind:
    """lag: how many steps (int), or for how many seconds (float), what is written may be behind what is done; 0 makes each
    step wait. waits: steps that had to. An entry is in `open` until it is sent, in `sent` until it is taken."""

    def __init__(self, lag: int | float = LAG) -> None:
        self.lag, self.waits = check_lag(lag), 0
        self.steps = lag if isinstance(lag, int) else SECONDS_STEPS
        self.seconds = math.inf if isinstance(lag, int) else lag
        self.block = max(1, min(self.steps // PARTS, ROWS // PARTS))
        self.open: list[Entry] = []
        self.sent: deque[Block] = deque()
        self.told = False

    def __len__(self) -> int:
        return len(self.open) + sum(len(block.entries) for block in self.sent)

    @property
    def first(self) -> int | None:
        """The step of the oldest."""
        entries = self.sent[0].entries if self.sent else self.open
        return entries[0].event.step if entries else None

    def put(self, event: StepEvent, kind: int) -> None:
        now = time.monotonic()
        self.open.append(Entry(event, kind, told.row_of(event), now))
        if len(self.open) >= self.block or now - self.open[0].since >= self.seconds / PARTS:
            self.send()

    def send(self) -> None:
        """Starts the copy of what is together."""
        if not self.open:
            return
        every, row = [t for entry in self.open for t in entry.row], None
        if every:
            device = every[-1].device
            row = Arriving(torch.cat([t if t.device == device else t.to(device, non_blocking=True) for t in every]))
        self.sent.append(Block(self.open, row))
        self.open = []

    def late(self) -> bool:
        """Whether more is outstanding than may be."""
        if len(self) > self.steps:
            return True
        first = self.sent[0].entries[0] if self.sent else self.open[0] if self.open else None
        return first is not None and time.monotonic() - first.since > self.seconds

    def taken(self, *, wait: bool) -> Iterator[tuple[StepEvent, int]]:
        """The steps whose numbers are here, in order, each with its kind; no longer kept. wait: for the oldest block."""
        if wait and not self.sent:
            self.send()
        while self.sent:
            block = self.sent[0]
            values = None
            if block.row is not None:
                values = block.row.wait() if wait else block.row.here()
                if values is None:
                    return
            wait = False
            self.sent.popleft()
            yield from _read(block.entries, values)

    def wait(self) -> Iterator[tuple[StepEvent, int]]:
        """The oldest, for which a step has to wait, and what has come with them. Where the device has nothing left to do
        then, that has cost time, and is told once."""
        self.waits += 1
        yield from self.taken(wait=True)
        if self.lag and not self.told and not self.sent:
            self.told = True
            warnings.warn(
                f"a step had to wait until the journal had the steps before it, and the device had nothing to do then: "
                f"lag is {self.lag!r}; give a larger one",
                ZokernWarning,
                stacklevel=6,
            )

    def clear(self) -> int:
        """Gives up what is kept; how many steps and folds it was."""
        count, self.open = len(self), []
        self.sent.clear()
        return count


def _read(entries: list[Entry], values: Tensor | None) -> Iterator[tuple[StepEvent, int]]:
    """values: their rows, one after another, on the host."""
    at = 0
    for entry in entries:
        if not entry.row:
            yield entry.event, entry.kind
            continue
        assert values is not None
        end = at + sum(map(Tensor.numel, entry.row))
        yield told.on_the_host(entry.event, values[at:end].clone()), entry.kind
        at = end
