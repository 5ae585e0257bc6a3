"""One JSON file per run: machine, driver, versions, commit, settings and results. A figure without these is none."""

from __future__ import annotations

import functools
import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from zokern.backends import native
from zokern.bench import commit as source
from zokern.finetune.replacing import write_whole
from zokern.report import versions

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"  # in a checkout


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


commit = functools.cache(source.commit)  # of the code that was loaded, not of a checkout that moved on during a run


def machine(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {"processor": processor(), "threads": torch.get_num_threads(), **versions()}
    facts["instruction_sets"] = native.extension.cpu_instruction_sets() if native.extension else []
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "driver": driver(), "cuda": torch.version.cuda}
    return facts


def driver() -> str:
    """NVIDIA's driver, as nvidia-smi names it; a container may have it outside PATH, or not at all."""
    smi = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/local/nvidia/bin")
    if smi is None:
        return "unknown: there is no nvidia-smi"
    command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"unknown: nvidia-smi ended with {done.returncode}"
    return done.stdout.split("\n")[0].strip()  # a line for each GPU of the machine; they share the driver


def store(
    name: str,
    device: torch.device,
    settings: Mapping[str, Any],
    results: Any,
    path: Path | None = None,
    *,
    complete: bool = True,
) -> Path:
    """Writes one run's JSON, by default to benchmarks/results/<name>-<device>.json. A kill leaves the old file or the new.

    complete: False while the run goes on, so that what a broken-off run left can be told from a whole one.
    """
    path = path or RESULTS / f"{name}-{device.type}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(device),
        "settings": dict(settings),
        "complete": complete,
        "results": results,
    }
    write_whole(path, (json.dumps(record, indent=1) + "\n").encode())
    return path
