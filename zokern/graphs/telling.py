"""What a captured step says of itself: its metrics, and all that a journal wants to know, in one row of device memory.

A launch fills the row, and one copy of it keeps the numbers: the next launch overwrites what the graph works on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zokern.contract.streams import derive_step, derive_stream
from zokern.optim import told
from zokern.optim.events import StepEvent


@dataclass
class Telling:
    """Of one captured kind of step. row: filled by a launch. event: the captured step's, with the graph's own tensors.
    names: of the metrics, whose numbers stand in the row from `at` on. streams: of the directions that it draws."""

    row: Tensor
    event: StepEvent
    names: list[str]
    at: int
    streams: list[int]

    def metrics(self, row: Tensor) -> dict[str, Tensor]:
        """Views of a row."""
        return dict(zip(self.names, row[self.at : self.at + len(self.names)].unbind(), strict=True))

    def event_of(self, step: int, run_seed: int, row: Tensor, layout: Mapping[str, Any]) -> StepEvent:
        """Of a launch. Its tensors are the graph's, as long as no other launch has been made; `row` stays."""
        at_step = derive_step(run_seed, step)
        drawn = {derive_stream(at_step, k): k for k in self.streams}
        return replace(self.event, step=step, drawn=drawn, layout=layout, row=row)


class Listening:
    """Stands in for an optimizer's listeners while a step is tried and captured: nobody else is told of it."""

    def __init__(self, optimizer: Any, device: torch.device) -> None:
        self.optimizer, self.device = optimizer, device
        self.heard: tuple[Tensor, StepEvent, list[str], int] | None = None

    def __call__(self, event: StepEvent) -> None:
        """Inside the captured step."""
        if event.ok is None:  # it broke off
            return
        metrics, every = self.optimizer.metrics, told.tensors(event)
        row = told.row(every, list(metrics.values()), self.device)
        at = sum(t.numel() * (2 if t.dtype in told.WIDE else 1) for t in every if t.device == self.device)
        self.heard = row, event, list(metrics), at

    def telling(self, streams: list[int]) -> Telling:
        """What the last step has told. streams: of its directions."""
        assert self.heard is not None
        return Telling(*self.heard, streams)
