"""Where a step's numbers come from: seeds, the groups' lr, eps and weight_decay, and what a schedule gives.

A step asks its source and does not know which one it has: the host's, here, or a device's memory, which a captured step
reads anew each time (zokern/graphs/live.py).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from zokern.contract.streams import ROUNDING_STREAM, STATE_STREAM, derive_seed, derive_step, derive_stream
from zokern.optim.told import now
from zokern.passes.update import CPU, Seed, sent

Rows = Sequence[tuple[int, Hashable]]  # the parameter group, and what tells rows of one group apart
HYPER = ("lr", "eps", "weight_decay")
NUMBERS = {float, int}


class StepNumbers(Protocol):
    """gate: int32 [1], a zero makes the step's passes write nothing; None where there is none. device: where losses have
    to be, None for anywhere. drawn: directions by seed, as far as the host knows."""

    @property
    def gate(self) -> Tensor | None: ...
    @property
    def device(self) -> torch.device | None: ...
    @property
    def drawn(self) -> Mapping[int, int]: ...

    def rates(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """lr, eps and weight_decay of each row's group, float64 [R] each."""

    def first_eps(self) -> float | Tensor:
        """eps of the first group."""

    def lrs(self) -> tuple[float | Tensor, ...]:
        """Each group's, as it is at this step, for those who are told of it."""

    def seed(self, k: int) -> Seed:
        """Of the step's direction k."""

    def next_seed(self, k: int) -> Seed:
        """Of the next step's direction k."""

    def rounding_seeds(self) -> Tensor:
        """int64 [2]: the weights' and a state's."""

    def scheduled(self, i: int) -> float | Tensor:
        """What the method's `schedule` gives for the step."""


class HostNumbers:
    """The host's, of one step. schedule: the method's.

    `drawn`: the directions whose seeds were asked for, by seed.
    """

    gate: Tensor | None = None
    device: torch.device | None = None

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], run_seed: int, step: int, schedule: Callable[[int], list[float]]
    ) -> None:
        self._groups, self._step, self._schedule, self._run_seed = groups, step, schedule, run_seed
        self._at_step = derive_step(run_seed, step)
        self.drawn: dict[int, int] = {}

    def rates(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """On the host; or, where a group's number is a tensor on a device, all of that name there."""
        given = [self._groups[g][name] for name in HYPER for g, _ in rows]
        if not NUMBERS.issuperset(map(type, given)):
            lr, eps, decay = (_together(given[i * len(rows) : (i + 1) * len(rows)]) for i in range(len(HYPER)))
        else:
            lr, eps, decay = torch.tensor(given, dtype=torch.float64, device=CPU).view(len(HYPER), len(rows)).unbind()
        return lr, eps, decay

    def first_eps(self) -> float | Tensor:
        eps = self._groups[0]["eps"]
        return eps.to(torch.float64) if isinstance(eps, Tensor) else float(eps)

    def lrs(self) -> tuple[float | Tensor, ...]:
        return tuple(now(group["lr"]) for group in self._groups)

    def seed(self, k: int) -> Seed:
        seed = derive_stream(self._at_step, k)
        self.drawn[seed] = k
        return seed

    def next_seed(self, k: int) -> Seed:
        return derive_seed(self._run_seed, self._step + 1, k)

    def rounding_seeds(self) -> Tensor:
        weights, state = derive_stream(self._at_step, ROUNDING_STREAM), derive_stream(self._at_step, STATE_STREAM)
        return torch.tensor([weights, state], dtype=torch.int64, device=CPU)

    def scheduled(self, i: int) -> float | Tensor:
        return self._schedule(self._step)[i]


def _together(values: Sequence[float | Tensor]) -> Tensor:
    """[R], on the host or on the device of the first value that is on one."""
    made = [
        value.to(torch.float64).reshape(())
        if isinstance(value, Tensor)
        else torch.tensor(float(value), dtype=torch.float64, device=CPU)
        for value in values
    ]
    device = next((v.device for v in made if v.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([sent(v, device) for v in made]) if made else torch.empty(0, device=CPU)
