"""Pictures of stored runs, from their JSON alone: `draw` finds out which picture a record needs.

bars        kernels: share of the copy bandwidth, ours beside the peers
roofline    kernels of one machine: GB/s over work per byte, below the copy's roof and on a GPU that of issue
step        whole steps: seconds of the forwards, of the passes and of all else, stacked
scaling     ns per parameter over the number of parameters

The machine is named below each picture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zokern.bench.canvas import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    RED,
    SKY,
    PlotError,
    Record,
    caption,
    figure_of,
    require,
    save,
)  # fmt: skip
from zokern.bench.cases import BENCHMARKS
from zokern.bench.plots_kernels import bars, roofline

WHOLE = "whole"
PARTS = {"forwards": SKY, "passes": RED, "other": "#999999", WHOLE: GREEN}
PART_NAMES = {
    "forwards": "forwards", "passes": "passes over the weights", "other": "everything else", WHOLE: "all in one graph",
}  # fmt: skip


def load(path: Path) -> dict[str, Any]:
    """A record that `zokern bench` stored.

    Raises:
        PlotError: where the file is missing or is something else.
    """
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise PlotError(f"{path} is not JSON: {error}") from None
    if not isinstance(record, dict) or not {"benchmark", "machine", "settings", "results"} <= record.keys():
        raise PlotError(f"{path} is not a record of zokern bench: it lacks benchmark, machine, settings or results")
    if not record["results"]:
        raise PlotError(f"{path} has no results: run the benchmark again")
    return record


def kind(record: Record) -> str | None:
    """Which picture a record needs; None for none of them."""
    name = record["benchmark"]
    return name if name in ("step", "scaling") else "bars" if name in {f"kernels-{b}" for b in BENCHMARKS} else None


def _timed(record: Record) -> Any:
    """The results with times: those that did not fit, or that there was no time for, have none."""
    results = record["results"]
    if isinstance(results, list):
        return [r for r in results if r["status"] == "timed"]
    return {name: r for name, r in results.items() if r["status"] == "timed"}


def draw(paths: Sequence[Path], output: Path) -> list[Path]:
    """A picture for each file, <stem>.png, and a roofline for each machine that kernels were timed on.

    Raises:
        PlotError: for a file that has no picture.
    """
    require()
    records = [(path, load(path)) for path in paths]
    for path, record in records:
        if kind(record) is None:
            raise PlotError(f"{path}: there is no picture for the benchmark {record['benchmark']!r}")
        if kind(record) != "bars" and not _timed(record):
            raise PlotError(f"{path}: nothing in it was timed; run the benchmark again, with more time or memory")
    output.mkdir(parents=True, exist_ok=True)
    drawn: list[Path] = []
    machines: dict[str, list[tuple[Path, Record]]] = {}
    for path, record in records:
        functions = {"bars": bars, "step": step, "scaling": scaling}
        drawn.append(functions[str(kind(record))](record, output / f"{path.stem}.png"))
        if kind(record) == "bars":
            machines.setdefault(caption(record), []).append((path, record))
    for number, group in enumerate(machines.values()):
        device = "cuda" if "gpu" in group[0][1]["machine"] else "cpu"
        name = f"kernels-roofline-{device}" + (f"-{number + 1}" if len(machines) > 1 else "")
        drawn.append(roofline([record for _, record in group], output / f"{name}.png"))
    return drawn


def step(record: Record, path: Path) -> Path:
    """Stacked bars of the timed cases, {case: {"forwards", "passes", "other"}} in seconds; the passes' share beside.

    A step in one graph has no parts, and is a bar of its own colour.
    """
    results = {name: r if "passes" in r else {**r, WHOLE: r["step"]["median"]} for name, r in _timed(record).items()}
    figure, axes = figure_of(8.2, max(1.5 + 0.34 * len(results), 2.6))
    shown = {part: colour for part, colour in PARTS.items() if any(part in r for r in results.values())}
    totals = [1e3 * sum(r.get(part, 0.0) for part in shown) for r in results.values()]
    start = [0.0] * len(results)
    for part, colour in shown.items():
        widths = [1e3 * r.get(part, 0.0) for r in results.values()]
        axes.barh(list(results), widths, 0.72, left=start, color=colour, label=PART_NAMES[part])
        start = [a + b for a, b in zip(start, widths, strict=True)]
    for at, (total, r) in enumerate(zip(totals, results.values(), strict=True)):
        text = (f"{total:,.0f} ms" if total >= 100 else f"{total:.3g} ms") + (
            f", passes {1e5 * r['passes'] / total:.0f} %" if "passes" in r else ""
        )
        axes.text(total + 0.008 * max(totals), at, text, va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.28 * max(totals))
    axes.set_xlabel("ms of one step", fontsize=9.5)
    axes.grid(axis="x", color="#e5e5e5")
    figure.legend(loc="outside upper left", ncols=len(shown), frameon=False, fontsize=8.5)
    return save(figure, record, path)


def scaling(record: Record, path: Path) -> Path:
    """Curves of the timed sizes, ns of a step's passes for a parameter, one for each dtype, method and placement."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in _timed(record):
        name = ", ".join(entry[key] for key in ("dtype", "method", "placement"))
        curves.setdefault(name, []).append((entry["parameters"], entry["ns_per_parameter"]["median"]))
    figure, axes = figure_of(8.2, 4.6)
    colours, lines = (BLUE, RED, GREEN, ORANGE, BLACK, SKY, PINK), ("-", "--", ":")
    for i, (name, points) in enumerate(curves.items()):
        x, y = zip(*sorted(points), strict=True)
        style = lines[i // len(colours) % len(lines)]
        axes.plot(x, y, style, marker="o", markersize=4.5, color=colours[i % len(colours)], label=name or None)
    axes.set(xscale="log", ylim=(0, 1.15 * max((y for points in curves.values() for _, y in points), default=1.0)))
    axes.set_xlabel("parameters", fontsize=9.5)
    axes.set_ylabel("ns per parameter", fontsize=9.5)
    axes.grid(which="both", color="#eeeeee")
    if any(curves):
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8.5)
    return save(figure, record, path)
