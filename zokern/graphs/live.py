"""The numbers of a step in device memory: what a captured step reads anew each time that it is launched again.

Seeds are derived on the device from a step counter, and the groups' lr, eps and weight_decay, with what a method computes
on the host for each step, are in tensors that are filled before a launch. A gate of 0 makes every pass write nothing, so
that a step can be tried without moving a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zokern.contract.streams import ROUNDING_STREAM, STATE_STREAM, derive_seeds
from zokern.optim.numbers import HYPER, Rows
from zokern.passes.update import CPU, sent


class DeviceNumbers:
    """A step's numbers (optim/numbers.py's StepNumbers) on `device`, for `num_groups` groups and as many scheduled ones."""

    drawn: Mapping[int, int] = {}  # nobody on the host knows

    def __init__(self, run_seed: int, num_groups: int, num_scheduled: int, device: torch.device) -> None:
        self.run_seed, self.device, self.num_groups = run_seed, device, num_groups
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.gate = torch.zeros(1, dtype=torch.int32, device=device)
        self.values = torch.zeros(len(HYPER) * num_groups + num_scheduled, dtype=torch.float64, device=device)
        self._filled: list[float] | None = None
        self._at: int | None = None  # what `step` is, where the host knows it
        self._streams: dict[int, int] = {}  # their places in the tensor below
        self._stream_numbers = torch.zeros(0, dtype=torch.int64, device=device)
        self._seeds: Sequence[Tensor] = ()

    # ----------------------------------------------------------------------------------------- what the step asks for

    def rates(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        lr, eps, decay = (torch.stack([self._hyper(name, g) for g, _ in rows]) for name in HYPER)
        return lr, eps, decay

    def first_eps(self) -> Tensor:
        return self._hyper("eps", 0)

    def lrs(self) -> tuple[Tensor, ...]:
        return tuple(self._hyper("lr", g).to(torch.float32) for g in range(self.num_groups))

    def seed(self, k: int) -> Tensor:
        """The step's seed of a stream, int64, 0-d: the same tensor each time within a step."""
        at = self._streams.setdefault(k, len(self._streams))
        if at >= len(self._seeds):  # while the step is tried: a captured one knows its streams
            missing = list(self._streams)[len(self._seeds) :]
            numbers = sent(torch.tensor(missing, dtype=torch.int64, device=CPU), self.device)
            self._seeds = [*self._seeds, *derive_seeds(self.run_seed, self.step, numbers).unbind()]
        return self._seeds[at]

    def next_seed(self, k: int) -> Tensor:
        stream = torch.full((1,), k, dtype=torch.int64, device=self.device)
        return derive_seeds(self.run_seed, self.step + 1, stream).reshape(())

    def rounding_seeds(self) -> Tensor:
        return torch.stack([self.seed(ROUNDING_STREAM), self.seed(STATE_STREAM)])

    def scheduled(self, i: int) -> Tensor:
        return self.values[len(HYPER) * self.num_groups + i]

    def _hyper(self, name: str, group: int) -> Tensor:
        return self.values[HYPER.index(name) * self.num_groups + group]

    # ------------------------------------------------------------------------------------------- what a graph does

    def fill(self, step: int, groups: Sequence[Mapping[str, Any]], scheduled: Sequence[float]) -> None:
        """Before a launch: what the step is to read."""
        values = [group[name] for name in HYPER for group in groups] + list(scheduled)
        host = [0.0 if isinstance(v, Tensor) and v.device.type != "cpu" else float(v) for v in values]
        if host != self._filled:
            self.values.copy_(torch.tensor(host, dtype=torch.float64, device=CPU), non_blocking=True)
            self._filled = host
        for i, value in enumerate(values):
            if isinstance(value, Tensor) and value.device.type != "cpu":
                self.values[i].copy_(value, non_blocking=True)
        if step != self._at:
            self.step.fill_(step)
            self._at = step

    def count(self) -> None:
        """The end of a step, as a part of it: the next launch is the next step."""
        self.step.add_(self.gate.reshape(()))

    def launched(self) -> None:
        """A captured step was."""
        if self._at is not None:
            self._at += 1

    @property
    def streams(self) -> list[int]:
        """The directions that have been asked for so far."""
        return [k for k in self._streams if k not in (ROUNDING_STREAM, STATE_STREAM)]

    def tensors(self) -> list[Tensor]:
        """What a step that is captured now reads; a later capture may replace some of them."""
        return [self.step, self.gate, self.values, self._stream_numbers]

    def begin(self) -> None:
        """Derives the seeds of all streams that have been asked for so far; a part of the step."""
        if len(self._streams) != len(self._stream_numbers):
            self._stream_numbers = sent(torch.tensor(list(self._streams), dtype=torch.int64, device=CPU), self.device)
        self._seeds = derive_seeds(self.run_seed, self.step, self._stream_numbers).unbind()
