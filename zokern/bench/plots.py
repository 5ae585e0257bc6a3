"""Pictures of stored runs, from their JSON alone: `draw` finds out which picture a record needs.

bars        kernels: share of the copy bandwidth, ours beside the peers
roofline    kernels of one machine: GB/s over work per byte, below the copy's roof and on a GPU that of issue
step        whole steps: seconds of the forwards, of the passes and of all else, stacked
scaling     ns per parameter over the number of parameters

The machine is named below each picture. Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zokern import drawing
from zokern.bench.cases import BENCHMARKS, is_ours
from zokern.finetune.replacing import fresh

REMEDY = 'pip install "zokern[bench]"'
INK = "#444444"
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7",
)  # fmt: skip
OURS, PEERS = (BLUE, SKY, GREEN, PINK), {"published": RED, "foreach": ORANGE, "compiled": BLACK}
BENCHMARK_COLOURS = (BLUE, PINK, ORANGE, GREEN, SKY, BLACK, YELLOW)
CURVE_COLOURS, CURVE_LINES = (BLUE, RED, GREEN, ORANGE, BLACK, SKY, PINK), ("-", "--", ":")
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}
PREDICTED = {"marker": "D", "color": YELLOW, "markeredgecolor": BLACK, "markersize": 5, "linestyle": "none"}
WHOLE = "whole"
PARTS = {
    "forwards": ("forwards", SKY), "passes": ("passes over the weights", RED), "other": ("everything else", "#999999"),
    WHOLE: ("all in one graph", GREEN),
}  # fmt: skip
Record = Mapping[str, Any]


class PlotError(Exception):
    """What stands in the way of a picture, and the remedy."""


def require() -> None:
    """Raise PlotError where matplotlib is missing: now, rather than after a long run."""
    try:
        drawing.load()
    except ImportError:
        raise PlotError(f"the plots need matplotlib, which is not installed: {REMEDY}, or use --no-plot") from None


# -------------------------------------------------------------------------------------------------------------- records


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


def caption(record: Record) -> str:
    """The machine of a run in one line."""
    machine = record["machine"]
    if "gpu" in machine:
        return f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, torch {machine['torch']}"
    sets = machine.get("instruction_sets") or ["no compiled module"]
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] != 1)
    return f"{machine['processor']}, {threads}, {sets[0]}, torch {machine['torch']}"


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
    functions: dict[str, Callable[[Record, Path], Path]] = {"bars": bars, "step": step, "scaling": scaling}
    drawn = [functions[str(kind(record))](record, output / f"{path.stem}.png") for path, record in records]
    machines: dict[str, list[Record]] = {}
    for _, record in records:
        if kind(record) == "bars":
            machines.setdefault(caption(record), []).append(record)
    for number, group in enumerate(machines.values(), 1):
        device = "cuda" if "gpu" in group[0]["machine"] else "cpu"
        name = f"kernels-roofline-{device}" + (f"-{number}" if len(machines) > 1 else "")
        drawn.append(roofline(group, output / f"{name}.png"))
    return drawn


# --------------------------------------------------------------------------------------------------------------- canvas


def figure_of(width: float, height: float) -> tuple[Any, Any]:
    figure = drawing.figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    axes.set_axisbelow(True)
    return figure, axes


def _label(axes: Any, x: str, y: str = "") -> None:
    """The axes and the grid: of bars, which have no name for y, only lines upwards."""
    axes.set_xlabel(x, fontsize=9.5)
    if y:
        axes.set_ylabel(y, fontsize=9.5)
    axes.grid(**({"which": "both", "color": "#eeeeee"} if y else {"axis": "x", "color": "#e5e5e5"}))


def _legend(figure: Any, columns: int) -> None:
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=8.5)


def save(figure: Any, record: Record, path: Path) -> Path:
    """With the machine named below; a file is written whole."""
    head, _, changes = record["commit"].partition("+")
    text = f"{caption(record)}; {record['date'][:10]}, commit {head[:10]}{' with ' + changes if changes else ''}"
    if not record.get("complete", True):
        text += "; the run broke off"
    drawing.plain(figure.supxlabel("", fontsize=7.5, color=INK, x=0.01, ha="left"), text)
    with fresh(path.parent) as work:
        figure.savefig(work / path.name)
        os.replace(work / path.name, path)
    return path


# ------------------------------------------------------------------------------------------------------------- pictures


def bars(record: Record, path: Path) -> Path:
    """Horizontal bars: the time of a copy of as many bytes over the time of each way, in %; diamonds: predicted."""
    rows: list[tuple[float, str, float, float | None]] = []  # where, label, share, prediction
    groups, y = [], 0.0
    for title, result in record["results"].items():
        ways = {label: way for label, way in result["ways"].items() if label != "copy"}
        groups.append((y + (len(ways) - 1) / 2, title))
        rows += [(y + i, label, 100 * way["share_of_copy"], way.get("predicted_share"))
                 for i, (label, way) in enumerate(ways.items())]  # fmt: skip
        y += len(ways) + 0.8
    ours = dict.fromkeys(label for _, label, _, _ in rows if label.startswith("zokern"))
    figure, axes = figure_of(8.2, max(1.5 + 0.19 * y, 2.6))
    for label, colour in {**dict(zip(ours, 2 * OURS, strict=False)), **PEERS}.items():
        chosen = {at: share for at, other, share, _ in rows if other == label}
        if chosen:
            axes.barh(list(chosen), list(chosen.values()), 0.88, color=colour, label=label)
    top = max(100.0, *(share for _, _, share, _ in rows))
    for at, _, share, predicted in rows:
        axes.text(share + 0.008 * top, at, f"{share:.0f}" if share >= 10 else f"{share:.1f}", va="center", fontsize=7.5)
        if predicted is not None:
            axes.plot(100 * predicted, at, **PREDICTED)
    if any(predicted is not None for *_, predicted in rows):
        axes.plot([], [], **PREDICTED, label="predicted")
    axes.axvline(100, color=INK, linewidth=1, linestyle="--")
    axes.set_yticks([at for at, _ in groups], [title for _, title in groups])
    axes.set(ylim=(y - 0.8, -1.0), xlim=(0, 1.07 * top))
    _label(axes, "share of the bandwidth of a copy of as many bytes, % (more is faster)")
    _legend(figure, 4)
    return save(figure, record, path)


def roofline(records: Sequence[Record], path: Path) -> Path:
    """GB/s over work per byte: instruction slots where every kernel of ours has them counted, else operations."""
    results = [
        (record["benchmark"].removeprefix("kernels-"), r) for record in records for r in record["results"].values()
    ]
    counted = all("slots" in way for _, r in results for label, way in r["ways"].items() if is_ours(label))
    results = [
        (name, r) for name, r in results if not r["case"]["left_out"]
    ]  # the same kernel as with nothing left out
    points: list[tuple[str, str, str, float, float]] = []  # benchmark, label, dtype, x, y
    for name, result in results:
        for label, way in result["ways"].items():
            if label == "published" or is_ours(label):
                work = way["slots"] if counted and "slots" in way else result["operations_per_element"]
                at = work / result["bytes_per_element"]
                points.append((name, label, result["case"]["dtype"], at, way["gb_per_s"]))
    figure, axes = figure_of(8.2, 5.0)
    shown = {name for name, *_ in points}
    colours = {name: c for name, c in zip(BENCHMARKS, BENCHMARK_COLOURS, strict=True) if name in shown}
    for name, label, dtype, x, y in points:
        filled = colours[name] if label != "published" else "none"
        axes.plot(x, y, MARKERS[dtype], color=filled, markeredgecolor=colours[name], markersize=7)
    left, right = 0.7 * min(p[3] for p in points), 1.4 * max(p[3] for p in points)
    copies = sorted(r["ways"]["copy"]["gb_per_s"] for _, r in results)
    roof = copies[len(copies) // 2]
    axes.axhline(roof, color=INK, linewidth=1.5)
    axes.axhspan(copies[0], copies[-1], color=INK, alpha=0.12, linewidth=0)
    axes.text(left, 1.05 * copies[-1], f" copy: {roof:,.0f} GB/s, and its range over the cases", fontsize=8.5)
    rate = records[0]["settings"].get("prediction", {}).get("issue_per_second")
    if rate is not None and counted:
        axes.plot([left, right], [rate / left / 1e9, rate / right / 1e9], color=RED, linestyle="--")
        axes.text(right, rate / right / 1e9, f"issue: {rate / 1e12:.1f}e12 instructions/s ", ha="right", fontsize=8.5)
    for name, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=name)
    for dtype in dict.fromkeys(p[2] for p in points):
        axes.plot([], [], MARKERS[dtype], color="#bbbbbb", markeredgecolor=INK, label=f"zokern, {dtype}")
    axes.plot([], [], "o", color="none", markeredgecolor=INK, label="published (hollow)")
    axes.set(
        xscale="log", yscale="log", xlim=(left, right), ylim=(None, 2.2 * max(copies[-1], *(p[4] for p in points)))
    )
    work_name = "instruction slots" if counted else "arithmetic operations of our pass"
    _label(axes, f"{work_name} per byte that the pass must move", "GB/s of the bytes that the pass must move")
    _legend(figure, 5)
    return save(figure, records[0], path)


def step(record: Record, path: Path) -> Path:
    """Stacked bars of the timed cases, {case: {"forwards", "passes", "other"}} in seconds; the passes' share beside.

    A step in one graph has no parts, and is a bar of its own colour.
    """
    results = {name: r if "passes" in r else {**r, WHOLE: r["step"]["median"]} for name, r in _timed(record).items()}
    figure, axes = figure_of(8.2, max(1.5 + 0.34 * len(results), 2.6))
    start, columns = [0.0] * len(results), 0
    for part, (name, colour) in PARTS.items():
        if any(part in r for r in results.values()):
            widths = [1e3 * r.get(part, 0.0) for r in results.values()]
            axes.barh(list(results), widths, 0.72, left=start, color=colour, label=name)
            start = [a + b for a, b in zip(start, widths, strict=True)]
            columns += 1
    longest = max(start)
    for at, (total, r) in enumerate(zip(start, results.values(), strict=True)):
        text = (f"{total:,.0f} ms" if total >= 100 else f"{total:.3g} ms") + (
            f", passes {1e5 * r['passes'] / total:.0f} %" if "passes" in r else ""
        )
        axes.text(total + 0.008 * longest, at, text, va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.28 * longest)
    _label(axes, "ms of one step")
    _legend(figure, columns)
    return save(figure, record, path)


def scaling(record: Record, path: Path) -> Path:
    """Curves of the timed sizes, ns of a step's passes for a parameter, one for each dtype, method and placement."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in _timed(record):
        name = ", ".join(entry[key] for key in ("dtype", "method", "placement"))
        curves.setdefault(name, []).append((entry["parameters"], entry["ns_per_parameter"]["median"]))
    figure, axes = figure_of(8.2, 4.6)
    for i, (name, points) in enumerate(curves.items()):
        x, y = zip(*sorted(points), strict=True)
        again, colour = divmod(i, len(CURVE_COLOURS))
        style = CURVE_LINES[again % len(CURVE_LINES)]
        axes.plot(x, y, style, marker="o", markersize=4.5, color=CURVE_COLOURS[colour], label=name)
    axes.set(xscale="log", ylim=(0, 1.15 * max(y for points in curves.values() for _, y in points)))
    _label(axes, "parameters", "ns per parameter")
    _legend(figure, 3)
    return save(figure, record, path)
