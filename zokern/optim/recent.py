"""Metrics and counts on the host without waiting for a device: those of a recent step, a little late."""

from __future__ import annotations

import torch
from torch import Tensor

from zokern.optim.arriving import Arriving
from zokern.optim.built import Built
from zokern.optim.told import is_far
from zokern.passes.update import CPU, sent


class Recent(Built):
    """Part of every optimizer."""

    _coming: tuple[list[str], Arriving] | None = None  # names, and the values on their way
    _recent: dict[str, float] | None = None

    def recent_metrics(self) -> dict[str, float]:
        """`metrics` as numbers, of a recent step, without waiting for the device, with "step" (how many steps were done
        then), "skipped_steps", "flat_steps" and "large_steps" as they were after it.

        Where a device has them, each call takes what has come of the copy that an earlier call began, and begins another:
        they are of the step of an earlier call, and the first call has nothing yet, {}. On a CPU they are the last step's.
        """
        if not self.metrics:
            return {}
        counts: list[float | Tensor] = [self.counters["steps"], self._skips.count]
        flats = self._guards.flats
        counts += [flats.numbers[0] if flats.there is None else flats.there[0], self._moves.seen[0]]
        every = dict(zip(("step", "skipped_steps", "flat_steps", "large_steps"), counts, strict=True)) | self.metrics
        device = next((t.device for t in every.values() if isinstance(t, Tensor) and is_far(t)), CPU)
        if device == CPU:
            self._recent = {name: float(value) for name, value in every.items()}
            return dict(self._recent)
        if self._coming is not None and (values := self._coming[1].values()) is not None:
            self._recent, self._coming = dict(zip(self._coming[0], values, strict=True)), None
        if self._coming is None:
            row = [_number(value, device) for value in every.values()]
            self._coming = list(every), Arriving(torch.stack(row))
        return dict(self._recent or {})


def _number(value: float | Tensor, device: torch.device) -> Tensor:
    """float64, 0-d, on the device; nothing waits."""
    if isinstance(value, Tensor):
        return sent(value.detach(), device).to(torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)
