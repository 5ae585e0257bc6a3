"""The memory of a call, as the allocator of the device reports it, and what there is.

On CUDA the caching allocator's own peak. On a CPU every allocation of torch's allocator, through the profiler: it sees
what a compiled graph takes too.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

MEASURED = "zokern: measured"  # marks the call among the profiler's events


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
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


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
