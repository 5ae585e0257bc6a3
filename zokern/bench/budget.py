"""What a benchmark may take, seconds since it began and bytes, and what a call took. Where its results go, as it goes on.

Memory is what the allocator of the device reports. On CUDA the caching allocator's own peak. On a CPU every allocation of
torch's allocator, through the profiler: it sees what a compiled graph takes too.
"""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from zokern.bench.record import store

T = TypeVar("T")
SAVE_EVERY = 5.0  # seconds
MEASURED = "zokern: measured"  # marks the call among the profiler's events


class DoesNotFit(Exception):
    """facts: what is recorded of the case, "status" and bytes. "needed_bytes" is more than "free_bytes", known beforehand;
    "computed_bytes" stands for it where the case was tried, needed more than was free, and nobody knows how much more:
    "held_bytes" is what the allocator held for it at most."""

    def __init__(self, **bytes_: int) -> None:
        super().__init__("does not fit")
        self.facts: dict[str, Any] = {"status": "does not fit", **bytes_}


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

    def require(self, needed: int) -> None:
        """Raises DoesNotFit where `needed` bytes, known beforehand, are more than can be had now."""
        free = self.free
        if needed > free:
            raise DoesNotFit(needed_bytes=needed, free_bytes=free)

    def attempt(self, call: Callable[[], T], computed: int) -> T:
        """What call() returns. computed: bytes that its tensors take, as far as they are known beforehand.

        An allocator takes more than they do: what it keeps in pieces that nothing fits into, and for a CUDA graph in a pool
        of its own. So a call can fail for which the computed bytes were free. All that is known then is that it needs more
        than was free.

        Raises:
            DoesNotFit: where the device's memory did not suffice.
        """
        free, on_gpu = self.free, self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        try:
            return call()
        except torch.OutOfMemoryError:
            held = {"held_bytes": torch.cuda.max_memory_reserved(self.device) - before} if on_gpu else {}
        finally:
            gc.collect()  # optimizers are parts of cycles
        # Here, where the frames of the call are gone, and their memory with them.
        raise DoesNotFit(computed_bytes=computed, free_bytes=free, **held)

    def save(self, name: str, settings: Mapping[str, Any], results: Any, path: Path, *, last: bool = False) -> None:
        """The run's JSON so far, "complete" when it is the `last`; before that, not within five seconds of the one before:
        the record asks git and the driver."""
        if not last and self.saved and time.monotonic() - self.saved[-1] < SAVE_EVERY:
            return
        about = {"seconds": round(self.seconds, 1), "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "")}
        store(name, self.device, {**settings, **about}, results, path, complete=last)
        self.saved[:] = [time.monotonic()]


def peak_bytes(call: Callable[[], object], device: torch.device, replaced: Iterable[Tensor] = ()) -> int:
    """The most bytes that torch held at once on `device` during call(), beyond what it held before.

    replaced: tensors whose memory call() may give up for another. A CPU's allocator knows sizes only of what was
    allocated while the profiler ran, so these move to new memory first.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines about itself each time
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        for tensor in replaced:
            tensor.data = tensor.data.clone()
        with torch.autograd.profiler.record_function(MEASURED):
            call()
    results = profile.kineto_results
    assert results is not None
    events = results.events()
    begin = next(event.start_ns() for event in events if event.name() == MEASURED)
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and event.device_type().name == "CPU" and event.start_ns() >= begin
    )
    held: Iterable[int] = itertools.accumulate((change for _, change in changes), initial=0)
    return max(held)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had on `device`: of main memory what the system calls available (elsewhere than on Linux
    all there is)."""
    if device.type == "cuda":
        gc.collect()
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
