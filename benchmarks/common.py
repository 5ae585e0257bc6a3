"""What the benchmarks share: timing in rounds, the machine's description, one JSON file per run.

Candidates are timed in turn, round after round, so that a drift of the machine's speed meets all of them; what is
reported is the median over rounds and its spread, and what may be quoted are ratios within one run. On a GPU each call is
timed by device events after the L2 cache was overwritten.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

RESULTS = Path(__file__).parent / "results"
L2_FLUSH_BYTES = 256 << 20


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--", "../csrc", "../zokern"], cwd=here, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("+changes" if dirty.stdout.strip() else "")


def machine(device: torch.device) -> dict[str, Any]:
    from zokern.backends import native
    from zokern.report import versions

    facts: dict[str, Any] = {"processor": processor(), "threads": torch.get_num_threads(), **versions()}
    facts["instruction_sets"] = native.extension.cpu_instruction_sets() if native.extension else []
    if device.type == "cuda":
        query = "--query-gpu=driver_version"
        driver = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True)
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "driver": driver.stdout.strip(),
            "cuda": torch.version.cuda,
        }
    return facts


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


def store(name: str, device: torch.device, settings: Mapping[str, Any], results: Any, path: Path | None = None) -> Path:
    """Writes one run's JSON, by default to benchmarks/results/<name>-<device>.json."""
    path = path or RESULTS / f"{name}-{device.type}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(device),
        "settings": dict(settings),
        "results": results,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
