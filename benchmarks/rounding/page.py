"""Writes "Updates that do not vanish" of docs/placements.md and its picture from benchmarks/results/rounding-cpu.json.

A record whose runs have not all ended gives a page and a picture that say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from benchmarks.parts import IMAGES, Record, load, panels, plain, signed, table
from zokern.bench.plots import BLACK, BLUE, RED, save

LABELS = {"nearest": "bfloat16, nearest", "stochastic": "bfloat16, stochastic", "float32": "float32, bfloat16 autocast"}
LINES = {"nearest": {"color": RED, "marker": "s"}, "stochastic": {"color": BLUE, "marker": "o"},
         "float32": {"color": BLACK, "linestyle": "--"}}  # fmt: skip
HEAD = (
    "weights, rounding", "runs", "held-out loss", "fall of the loss", "accuracy, %", "arrived of an update, %",
    "weights with other bits than at the start, %",
)  # fmt: skip


def runs_by_way(record: Record) -> dict[str, list[Record]]:
    """The finished runs of each way that has any, in the order of LABELS."""
    ways = {way: [run for run in record["results"] if run["way"] == way] for way in LABELS}
    return {way: runs for way, runs in ways.items() if runs}


# ------------------------------------------------------------------------------------------------------------ the text


def half_spacing(weight: float) -> float:
    """Half the distance between bfloat16 numbers (8 significant bits) of about this size: 2^(e - 8), 2^e <= weight."""
    return math.ldexp(1.0, math.frexp(weight)[1] - 1 - 8)


def told(values: Sequence[float], form: Callable[[float], str]) -> str:
    """The mean, and the range where it has a width in the digits shown."""
    low, high = form(min(values)), form(max(values))
    return form(fmean(values)) + (f" ({low} to {high})" if low != high else "")


def fall(run: Record) -> float:
    """How far the held-out loss fell from before the first step to after the last."""
    return run["rows"][0]["loss"] - run["rows"][-1]["loss"]


def looks(run: Record) -> list[dict[str, float]]:
    """The rows after a step: all but the first."""
    return run["rows"][1:]


def row(way: str, runs: list[Record]) -> list[str]:
    last = [run["rows"][-1] for run in runs]
    four, percent = "{:.4f}".format, lambda share: f"{100 * share:.1f}"
    return [
        LABELS[way],
        str(len(runs)),
        told([r["loss"] for r in last], four),
        told([fall(run) for run in runs], four),
        told([r["accuracy"] for r in last], percent),
        told([fmean(r["arrived"] for r in looks(run)) for run in runs], percent),
        told([r["changed"] for r in last], percent),
    ]


def differences(ways: dict[str, list[Record]], one: str, other: str) -> str | None:
    """The final loss of `one` minus that of `other`, for each seed that both have run; None for no seed."""
    mine, others = ({run["seed"]: run["rows"][-1]["loss"] for run in ways.get(way, [])} for way in (one, other))
    values = ", ".join(signed(mine[seed] - others[seed], 4) for seed in sorted(mine.keys() & others.keys()))
    return f"{LABELS[one]} minus {LABELS[other]}: {values}" if values else None


def falls(ways: dict[str, list[Record]]) -> str | None:
    """The mean fall of the loss over that of float32, on the seeds that all ways have run; None without such a fall."""
    seeds = set.intersection(*({run["seed"] for run in ways.get(way, [])} for way in LABELS))
    means = {way: fmean(fall(run) for run in ways[way] if run["seed"] in seeds) for way in LABELS if seeds}
    if not means or means["float32"] <= 0:
        return None
    nearest, stochastic = (means[way] / means["float32"] for way in ("nearest", "stochastic"))
    return (
        f"Of the fall of the loss with float32 weights, bfloat16 weights make {100 * nearest:.0f} % with rounding to "
        f"nearest and {100 * stochastic:.0f} % with stochastic rounding."
    )


def conditions(record: Record, ways: dict[str, list[Record]]) -> str:
    s, m = record["settings"], record["machine"]
    runs = sum(len(of_way) for of_way in ways.values())
    whole = len(LABELS) * s["seeds"]
    count = f"{runs} runs ({len(LABELS)} ways, {s['seeds']} seeds)"
    if not record["complete"] or runs != whole:
        count = f"**Incomplete: {runs} of {whole} runs had ended.** {runs} run{'s' * (runs != 1)}"
    skipped = sum(run["skipped"] for run in record["results"])
    return (
        f"{count} of {s['steps']} steps with lr {s['lr']:g}, momentum {s['beta']:g}, eps {s['eps']:g}, batches of "
        f"{s['batch_size']} from {s['texts']['train']:,} texts, {s['texts']['eval']} held out, {s['parameters'] / 1e6:.1f} "
        f"million weights; skipped steps: {skipped}. {m['threads']} thread for each run on an {m['processor']} "
        f"({m['instruction_sets'][0]}), torch {m['torch']}, {record['date'][:10]}, commit {record['commit'][:12]}."
    )


def sizes(record: Record) -> str:
    """How large the updates are against what nearest rounding can lose."""
    median = record["settings"]["median_weight"]
    rms = math.sqrt(fmean(r["update"] ** 2 for run in record["results"] for r in looks(run)))
    return (
        f"The root mean square of a step's updates is {rms:.1e}. A weight of the median magnitude, {median:.3f}, rounded "
        f"to nearest, keeps its bits under any update below {half_spacing(median):.1e}, "
        f"{half_spacing(median) / rms:.0f} times as much."
    )


def rounding_part(record: Record | None = None) -> str:
    record = record or load("rounding-cpu.json")
    ways, every = runs_by_way(record), record["settings"]["every"]
    pairs = [differences(ways, "nearest", "stochastic"), differences(ways, "stochastic", "float32")]
    seeds = "; ".join(pair for pair in pairs if pair)
    parts = [
        conditions(record, ways),
        sizes(record),
        table(HEAD, [row(way, runs) for way, runs in ways.items()]),
        f"Mean (lowest to highest run) at the last step; what arrived: mean of every {every}th step.",
        falls(ways),
        f"Final loss, seed by seed: {seeds}." if seeds else None,
    ]
    return "\n\n".join(part for part in parts if part)


# --------------------------------------------------------------------------------------------------------- the picture


def curve(axes: Any, way: str, runs: list[Record], key: str, scale: float = 1.0) -> None:
    """The mean of the runs as a line, their range as a band; rows that lack `key` are left out."""
    rows = list(zip(*([r for r in run["rows"] if key in r] for run in runs), strict=True))
    steps, values = [at[0]["step"] for at in rows], [[scale * r[key] for r in at] for at in rows]
    line = {"linewidth": 1.8, "markersize": 3.5, **LINES[way]}
    axes.plot(steps, [fmean(v) for v in values], label=f"{LABELS[way]} ({len(runs)})", zorder=3, **line)
    band = {"color": LINES[way]["color"], "alpha": 0.15, "linewidth": 0}
    axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], **band)


def draw() -> None:
    record = load("rounding-cpu.json")
    figure, (left, right) = panels(2, 9.6, 4.3)
    for way, runs in runs_by_way(record).items():
        curve(left, way, runs, "loss")
        curve(right, way, runs, "arrived", 100)
    left.set_title("Held-out loss", loc="left", fontsize=10.5)
    right.set_title("Share of a step's update that the weights take on, %", loc="left", fontsize=10.5)
    right.set_ylim(0, 112)
    for axes in (left, right):
        axes.set_xlabel("steps", fontsize=9.5)
        axes.set_xlim(0, 1.015 * record["settings"]["steps"])  # the last markers whole
        axes.set_axisbelow(True)
        plain(axes, labelsize=9)
    handles, labels = left.get_legend_handles_labels()
    title = "weights and rounding of the update (runs): line, their mean; band, their range"
    figure.legend(handles, labels, title=title, loc="outside upper left", ncols=3, frameon=False, fontsize=9,
                  title_fontsize=8.5, alignment="left")  # fmt: skip
    save(figure, record, IMAGES / "rounding.png")


PAGES = {"docs/placements.md": {"rounding": rounding_part}}
