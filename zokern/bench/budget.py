"""What a benchmark may take: seconds since it began, and bytes. And where its results go, after every case."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zokern.bench.memory import free_bytes
from zokern.bench.record import store

SAVE_EVERY = 5.0  # seconds


@dataclass(frozen=True)
class Budget:
    """time_limit: seconds from now on; memory_limit: bytes of `device`, where that is less than what is free."""

    device: torch.device
    time_limit: float | None = None
    memory_limit: int | None = None
    begun: float = field(default_factory=time.monotonic)
    saved: list[float] = field(default_factory=list)  # when the file was last written

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.begun

    @property
    def spent(self) -> bool:
        return self.time_limit is not None and self.seconds >= self.time_limit

    @property
    def free(self) -> int:
        """Bytes that can be had now."""
        free = free_bytes(self.device)
        return free if self.memory_limit is None else min(free, self.memory_limit)

    def unfit(self, needed: int) -> dict[str, Any]:
        """What is recorded of a case that needs more than there is."""
        return {"status": "does not fit", "needed_bytes": needed, "free_bytes": self.free}

    def save(self, name: str, settings: Mapping[str, Any], results: Any, path: Path, *, last: bool = False) -> None:
        """The run's JSON so far, "complete" when it is the `last`; before that, not within five seconds of the one before:
        the record asks git and the driver."""
        if not last and self.saved and time.monotonic() - self.saved[-1] < SAVE_EVERY:
            return
        about = {"seconds": round(self.seconds, 1), "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "")}
        store(name, self.device, {**settings, **about}, results, path, complete=last)
        self.saved[:] = [time.monotonic()]
