"""What benchmarks/results has of the runs on a CPU, for the pages that tell of them."""

from __future__ import annotations

import functools
from statistics import mean, median, stdev
from typing import Any

from benchmarks.llm.methods import METHODS
from benchmarks.parts import Record, load, signed
from zokern.bench.record import RESULTS

RUNS, COST = "llm-cpu.json", "llm-cost-cpu.json"
NONE = "No run is stored yet."


@functools.cache
def stored(name: str) -> dict[str, Any]:
    """A results file; {} where it is not there yet."""
    return load(name) if (RESULTS / name).is_file() else {}


def results() -> dict[str, Any]:
    found: dict[str, Any] = stored(RUNS).get("results", {})
    return found


def costs() -> dict[str, Record]:
    found: dict[str, Record] = stored(COST).get("results", {})
    return found


def ran() -> dict[str, Record]:
    """The methods with a run, the most accurate first, backpropagation last."""
    found = {name: part for name, part in results().get("methods", {}).items() if name in METHODS and part["runs"]}
    return dict(sorted(found.items(), key=lambda one: (METHODS[one[0]].backward, -mean(ends(one[1]["runs"])))))


def ends(runs: list[Record], look: int = -1) -> list[float]:
    """Of each run, the accuracy at a look of its curve, in %."""
    return [100 * run["curve"][look]["accuracy"] for run in runs]


def losses(runs: list[Record], look: int = -1) -> list[float] | None:
    """The same of the loss; None where a run has diverged."""
    found = [run["curve"][look]["loss"] for run in runs]
    return None if None in found else found


def spread(values: list[float] | None, digits: int = 1, sign: bool = False) -> str:
    """Mean and standard deviation, 1/(N - 1); of one value itself; "diverged" for None. sign: of the mean, always."""
    if values is None:
        return "diverged"
    told = signed(mean(values), digits) if sign else f"{mean(values):.{digits}f}"
    return told + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def in_forwards(name: str) -> float:
    """The time of a step, in forwards of the same batch, which were timed between its steps."""
    return float(costs()[name]["seconds"] / costs()[name]["forward_seconds"])


def step_seconds(name: str) -> float:
    """The time of a step, as if all methods had been measured while a forward took the same.

    The machine's speed drifts by a tenth within minutes. Where texts are padded a forward is another one: as measured.
    """
    one = costs()[name]
    if not one["packed"]:
        return float(one["seconds"])
    return in_forwards(name) * median(other["forward_seconds"] for other in costs().values() if other["packed"])
