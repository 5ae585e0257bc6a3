"""Counts the steps that were skipped because a loss was not finite, where the losses are, and warns of the first."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from zokern._checks import ZokernWarning
from zokern.passes.update import sent


class Skips:
    """count: int64, 0-d, on the device of the losses."""

    def __init__(self) -> None:
        self.count = torch.zeros((), dtype=torch.int64)
        self._seen: tuple[Tensor, torch.cuda.Event] | None = None
        self._warned = False

    def load(self, count: int) -> None:
        self.count = torch.tensor(count, dtype=torch.int64)
        self._warned = self._warned or count > 0

    def note(self, ok: Tensor, gate: Tensor | None) -> Tensor:
        """A step that is ok or not; returns whether its passes do anything, which the gate of a captured step says too."""
        if gate is not None:
            opened = gate.reshape(()).to(torch.bool)
            self.count.add_(~ok & opened)
            return ok & opened
        if ok.device.type == "cpu" and self.count.device.type == "cpu":
            self.count += int(not ok)
            self.warn()
        else:
            self.count = sent(self.count, ok.device)
            self.count.add_(~ok)
            self.look()
        return ok

    def look(self) -> None:
        """Starts a copy of the count to the host, to be looked at in a later step without waiting."""
        if self.count.device.type != "cpu" and self._seen is None and not self._warned:
            host = torch.empty((), dtype=torch.int64, pin_memory=True)
            host.copy_(self.count, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.count.device))
            self._seen = (host, event)

    def warn(self) -> None:
        """Once, if the host knows of a step that was skipped."""
        count = 0
        if self._warned:
            return
        if self.count.device.type == "cpu":
            count = int(self.count)
        elif self._seen is not None:
            host, event = self._seen
            if event.query():
                count, self._seen = int(host), None
        if count:
            self._warned = True
            warnings.warn(
                "a loss was not finite, so the update of that step was skipped (weights unchanged). Further skips are "
                "only counted: see skipped_steps. In float16 try bfloat16 or a smaller eps.",
                ZokernWarning,
                stacklevel=5,
            )
