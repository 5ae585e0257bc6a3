"""Times candidates in rounds, in turn, so that a drift of the machine's speed meets all of them.

What is reported is the median over rounds and its spread, and what may be quoted are ratios within one run. On a GPU each
call is timed by device events after the L2 cache was overwritten.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from rich.progress import Progress

L2_FLUSH_BYTES = 256 << 20
MAX_CLOCK = 3e9  # cycles a second, above any GPU's: what _sleep gets must last at least as long as it should
HEAD_START = 1.5  # of the time that the host takes to queue a call
MAX_HEAD_START = 0.02  # seconds; in that time a host queues more kernels than a GPU's queue holds


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """What is recorded of the rounds."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "rounds": len(seconds)}


def time_in_rounds(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    title: str,
    *,
    progress: Progress | None = None,
    device_only: bool = False,
) -> dict[str, dict[str, float]]:
    """Seconds of one call of each candidate: median, fastest and slowest of `rounds`, taken in turn after a warm-up.

    progress: a live display to add a task to; without one, a display of its own.
    device_only: for kernels. A GPU is kept busy until the host has queued the call, so that the time is the kernels' and
        not that of the Python around them. (A call that queues more than about a thousand kernels fills the queue, and
        the host is waited for all the same.) Without it, or on a CPU, what the host does counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    host = dict.fromkeys(candidates, 0.0)  # seconds to queue a call
    with contextlib.ExitStack() as stack:
        shown = progress or stack.enter_context(Progress(transient=True))
        task = shown.add_task(title, total=(rounds + 1) * len(candidates))
        for round_number in range(rounds + 1):
            for name, call in candidates.items():
                start = time.perf_counter()
                if flush is None:
                    call()
                    elapsed = time.perf_counter() - start
                else:
                    if round_number == 0:  # compiles kernels and fills caches, which must not count as queueing
                        call()
                        torch.cuda.synchronize(device)
                    elapsed, host[name] = _time_on_device(call, flush, host[name] if device_only else 0.0)
                if round_number:  # the first is the warm-up
                    seconds[name].append(elapsed)
                shown.advance(task)
        shown.remove_task(task)
    return {name: spread(s) for name, s in seconds.items()}


def _time_on_device(call: Callable[[], object], flush: torch.Tensor, wait: float) -> tuple[float, float]:
    """Seconds between two device events around a call, and seconds that the host took to queue it."""
    with torch.cuda.device(flush.device):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if wait:
            torch.cuda._sleep(int(min(HEAD_START * wait, MAX_HEAD_START) * MAX_CLOCK))
        begin.record()
        start = time.perf_counter()
        call()
        queued = time.perf_counter() - start
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3, queued
