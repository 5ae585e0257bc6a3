"""Pictures of kernel benchmarks: bars of the share of the copy bandwidth, and the roofline of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zokern.bench.canvas import (
    BLACK,
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PINK,
    RED,
    SKY,
    YELLOW,
    Record,
    figure_of,
    save,
)  # fmt: skip
from zokern.bench.cases import BENCHMARKS, is_ours

OURS = (BLUE, SKY, GREEN, PINK)
PEERS = {"published": RED, "foreach": ORANGE, "compiled": BLACK}
BENCHMARK_COLOURS = (BLUE, PINK, ORANGE, GREEN, SKY, BLACK, YELLOW)
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}


def bars(record: Record, path: Path) -> Path:
    """Horizontal bars: the time of a copy of as many bytes over the time of each way, in %; diamonds: predicted."""
    rows: list[tuple[float, str, float, str, float | None]] = []
    groups, y = [], 0.0
    labels = list(dict.fromkeys(label for r in record["results"].values() for label in r["ways"] if label != "copy"))
    ours = dict(zip([label for label in labels if label.startswith("zokern")], 2 * OURS, strict=False))
    for title, result in record["results"].items():
        ways = {label: way for label, way in result["ways"].items() if label != "copy"}
        groups.append((y + (len(ways) - 1) / 2, title))
        for label, way in ways.items():
            rows.append((y, label, 100 * way["share_of_copy"], {**ours, **PEERS}[label], way.get("predicted_share")))
            y += 1.0
        y += 0.8
    figure, axes = figure_of(8.2, max(1.5 + 0.19 * y, 2.6))
    for label, colour in {**ours, **PEERS}.items():
        chosen = [(at, share) for at, other, share, _, _ in rows if other == label]
        if chosen:
            axes.barh([at for at, _ in chosen], [share for _, share in chosen], 0.88, color=colour, label=label)
    top = max(100.0, *(share for _, _, share, _, _ in rows))
    for at, _, share, _, predicted in rows:
        axes.text(share + 0.008 * top, at, f"{share:.0f}" if share >= 10 else f"{share:.1f}", va="center", fontsize=7.5)
        if predicted is not None:
            axes.plot(100 * predicted, at, "D", color=YELLOW, markeredgecolor=BLACK, markersize=5)
    if any(predicted is not None for *_, predicted in rows):
        axes.plot([], [], "D", color=YELLOW, markeredgecolor=BLACK, markersize=5, label="predicted", linestyle="none")
    axes.axvline(100, color=INK, linewidth=1, linestyle="--")
    axes.set_yticks([at for at, _ in groups], [title for _, title in groups])
    axes.set_ylim(y - 0.8, -1.0)
    axes.set_xlim(0, 1.07 * top)
    axes.set_xlabel("share of the bandwidth of a copy of as many bytes, % (more is faster)", fontsize=9.5)
    axes.grid(axis="x", color="#e5e5e5")
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=8.5)
    return save(figure, record, path)


def roofline(records: Sequence[Record], path: Path) -> Path:
    """GB/s over work per byte: instruction slots where every kernel of ours has them counted, else operations."""
    points: list[tuple[str, str, str, float, float]] = []
    counted = all(
        "slots" in way
        for record in records
        for result in record["results"].values()
        for label, way in result["ways"].items()
        if is_ours(label)
    )
    copies = []
    for record in records:
        for result in record["results"].values():
            if result["case"]["left_out"]:
                continue  # the same kernel as with nothing left out
            copies.append(result["ways"]["copy"]["gb_per_s"])
            for label, way in result["ways"].items():
                if label == "published" or is_ours(label):
                    work = way["slots"] if counted and "slots" in way else result["operations_per_element"]
                    name = record["benchmark"].removeprefix("kernels-")
                    at = work / result["bytes_per_element"]
                    points.append((name, label, result["case"]["dtype"], at, way["gb_per_s"]))
    figure, axes = figure_of(8.2, 5.0)
    shown = {name for name, *_ in points}
    colours = {name: c for name, c in zip(BENCHMARKS, BENCHMARK_COLOURS, strict=True) if name in shown}
    for name, label, dtype, x, y in points:
        filled = colours[name] if label != "published" else "none"
        axes.plot(x, y, MARKERS[dtype], color=filled, markeredgecolor=colours[name], markersize=7)
    left, right = 0.7 * min(p[3] for p in points), 1.4 * max(p[3] for p in points)
    roof = sorted(copies)[len(copies) // 2]
    axes.axhline(roof, color=INK, linewidth=1.5)
    axes.axhspan(min(copies), max(copies), color=INK, alpha=0.12, linewidth=0)
    axes.text(left, 1.05 * max(copies), f" copy: {roof:,.0f} GB/s, and its range over the cases", fontsize=8.5)
    rate = records[0]["settings"].get("prediction", {}).get("issue_per_second")
    if rate is not None and counted:
        axes.plot([left, right], [rate / left / 1e9, rate / right / 1e9], color=RED, linestyle="--")
        axes.text(right, rate / right / 1e9, f"issue: {rate / 1e12:.1f}e12 instructions/s ", ha="right", fontsize=8.5)
    for name, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=name)
    for dtype in dict.fromkeys(p[2] for p in points):
        axes.plot([], [], MARKERS[dtype], color="#bbbbbb", markeredgecolor=INK, label=f"zokern, {dtype}")
    axes.plot([], [], "o", color="none", markeredgecolor=INK, label="published (hollow)")
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(None, 2.2 * max(*copies, *(p[4] for p in points))))
    work_name = "instruction slots" if counted else "arithmetic operations of our pass"
    axes.set_xlabel(f"{work_name} per byte that the pass must move", fontsize=9.5)
    axes.set_ylabel("GB/s of the bytes that the pass must move", fontsize=9.5)
    axes.grid(which="both", color="#eeeeee")
    figure.legend(loc="outside upper left", ncols=5, frameon=False, fontsize=8.5)
    return save(figure, records[0], path)
