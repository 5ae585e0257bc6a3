"""Times candidates in rounds, in turn, so that a drift of the machine's speed meets all of them.

What is reported is the median over rounds and its spread, and what may be quoted are ratios within one run. On a GPU each
call is timed by device events after the L2 cache was overwritten.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from rich.progress import Progress

L2_FLUSH_BYTES = 256 << 20


def time_in_rounds(
    candidates: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, title: str
) -> dict[str, dict[str, float]]:
    """Seconds of one call of each candidate: median, fastest and slowest of `rounds`, taken in turn after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    with Progress(transient=True) as progress:
        task = progress.add_task(title, total=(rounds + 1) * len(candidates))
        for round_number in range(rounds + 1):
            for name, call in candidates.items():
                if flush is None:
                    start = time.perf_counter()
                    call()
                    elapsed = time.perf_counter() - start
                else:
                    flush.zero_()
                    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    begin.record()
                    call()
                    end.record()
                    end.synchronize()
                    elapsed = begin.elapsed_time(end) / 1e3
                if round_number:  # the first is the warm-up
                    seconds[name].append(elapsed)
                progress.advance(task)
    return {
        name: {"median": statistics.median(s), "min": min(s), "max": max(s), "rounds": len(s)}
        for name, s in seconds.items()
    }
