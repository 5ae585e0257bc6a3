"""Python's time of a step: what the host does for a model of 60 tensors, with a journal and without, beside another build.

    python -m benchmarks.steps.host                       # this build: journal over none
    python -m benchmarks.steps.host --beside ../zokern-9a8c2c2   # and over another checkout, built in place

Each build has processes of its own, which take turns in one run; a window is 100 steps, and what is told is the median over
the windows of one's seconds a step over the other's in the same window. "as on a device": the numbers of a step count as
far away and their copies come late, so that the step takes a device's operations and the journal a device's way. Without
forwards the closure returns a stored loss; with them it runs the model on 4 rows. Stores benchmarks/results/host-cpu.json.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks import study
from benchmarks.parts import load, made_on, table
from zokern.bench.record import store

WORKER = Path(__file__).with_name("host_worker.py")
METHODS = ("MeZO", "HiZOO")
ROOT = Path(__file__).resolve().parents[2]


class Process:
    """A build at work."""

    def __init__(self, root: Path, method: str, forwards: bool, device: bool) -> None:
        command = [sys.executable, str(WORKER), method, "forwards" if forwards else "", "device" if device else ""]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._told()

    def _told(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of this benchmark ended early, with code {self.process.wait()}")
        return line

    def seconds(self, way: str) -> float:
        assert self.process.stdin is not None
        print(way, file=self.process.stdin, flush=True)
        return float(self._told())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def ratio(each: list[tuple[float, float]]) -> float:
    return statistics.median(a / b for a, b in each)


def measure(method: str, forwards: bool, device: bool, windows: int, beside: Path | None) -> dict[str, float]:
    """Of one method: this build's steps with a journal over those without, and over the other build's."""
    own = Process(ROOT, method, forwards, device)
    other = Process(beside, method, forwards, False) if beside is not None and not device else None
    pairs: dict[str, list[tuple[float, float]]] = {"journal over none": []}
    try:
        for _ in range(windows):
            plain, journal = own.seconds("plain"), own.seconds("journal")
            pairs["journal over none"].append((journal, plain))
            if other is not None:
                theirs = other.seconds("plain"), other.seconds("journal")
                for name, a, b in (("plain", plain, theirs[0]), ("journal", journal, theirs[1])):
                    pairs.setdefault(f"{name} over the other build's", []).append((a, b))
                pairs.setdefault("journal over the other build's plain", []).append((journal, theirs[0]))
    finally:
        own.close()
        if other is not None:
            other.close()
    return {name: ratio(each) for name, each in pairs.items()}


def main() -> None:
    parser = study.parser(
        __doc__, windows=(25, "of 100 steps, timed"), beside=(Path, "another checkout, with its module built in place"),
    )  # fmt: skip
    args = parser.parse_args()
    if args.windows < 1:
        parser.error("--windows must be at least 1")
    if args.beside is not None and not (args.beside / "zokern" / "__init__.py").is_file():
        parser.error(f"--beside is {args.beside}, where there is no zokern")
    results: dict[str, dict[str, float]] = {}
    kinds = list(itertools.product(METHODS, (False, True), (False, True)))
    for method, forwards, device in track(kinds, description="steps", console=Console(stderr=True)):
        name = f"{method}{', with forwards' if forwards else ''}{', as on a device' if device else ''}"
        results[name] = measure(method, forwards, device, args.windows, args.beside)
    Console().print(_rows(results), highlight=False)
    path: Path = store("host", torch.device("cpu"), {"windows": args.windows}, results, args.output)
    print("stored in", path.name)


def _rows(results: Mapping[str, Mapping[str, float]]) -> str:
    columns = list(dict.fromkeys(name for one in results.values() for name in one))
    rows = [[way, *(f"{one[name]:.2f}" if name in one else "" for name in columns)] for way, one in results.items()]
    return table(["", *columns], rows)


def part() -> str:
    run = load("host-cpu.json")
    head = (
        f"{made_on(run)}; a model of 60 tensors of up to 16 x 16, one thread; medians of {run['settings']['windows']} "
        f"windows of 100 steps. The other build is 9a8c2c2."
    )
    return f"{head}\n\n{_rows(run['results'])}"


PAGES = {"docs/journal.md": {"host": part}}


if __name__ == "__main__":
    main()
