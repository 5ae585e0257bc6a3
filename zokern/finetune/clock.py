"""Where the time of a step goes: the forwards (the closure) and the passes (all the rest of the optimizer's step).

On a CPU by time.perf_counter. On CUDA by pairs of events on the device's current stream, read only when a log line
synchronises anyway: timing never makes the host wait for the device.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Clock:
    """Seconds spent inside `measure("forwards")` and `measure("step")`, by name; the latter includes the former."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`. A block that raises counts too, but not on CUDA."""
        if self._device.type == "cuda":
            begin = self._event()
            yield
            self._pending.append((name, begin, self._event()))
            return
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begun

    def _event(self) -> torch.cuda.Event:
        """An event recorded now. Without a stream it would be one of the current device, which may be another GPU."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self) -> dict[str, float]:
        """All seconds so far, by name. Waits for the device: call it where a value is read from it anyway."""
        if self._pending:
            torch.cuda.synchronize(self._device)
        for name, begin, end in self._pending:
            self._seconds[name] = self._seconds.get(name, 0.0) + begin.elapsed_time(end) / 1e3
        self._pending.clear()
        return dict(self._seconds)


def memory(device: torch.device) -> int:
    """Bytes of main memory this process holds now (Linux; elsewhere its peak), or of `device` where that is a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: of the GPU where `device` is one, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
