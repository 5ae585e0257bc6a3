"""Writes "Updates that do not vanish" of docs/placements.md and its picture from benchmarks/results/rounding-cpu.json.

python benchmarks/rounding_page.py           # rewrites the figures and draws docs/images/rounding.png
python benchmarks/rounding_page.py --check   # exit code 1 if the page is not what this would write

A record whose runs have not all ended gives a page and a picture that say so.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pages import ROOT, load, update

from zokern.bench.plots import BLACK, BLUE, INK, RED, require, save

IMAGE = ROOT / "docs" / "images" / "rounding.png"
LABELS = {
    "nearest": "bfloat16, nearest",
    "stochastic": "bfloat16, stochastic",
    "float32": "float32, bfloat16 autocast",
}
LINES = {
    "nearest": {"color": RED, "marker": "s"},
    "stochastic": {"color": BLUE, "marker": "o"},
    "float32": {"color": BLACK, "linestyle": "--"},
}
HEAD = (
    "weights, rounding", "runs", "held-out loss", "fall of the loss", "accuracy, %", "arrived of an update, %",
    "weights with other bits than at the start, %",
)  # fmt: skip
Run = dict[str, Any]


def runs_by_way(record: dict[str, Any]) -> dict[str, list[Run]]:
    """The finished runs of each way that has any, in the order of LABELS."""
    ways = {way: [run for run in record["results"] if run["way"] == way] for way in LABELS}
    return {way: runs for way, runs in ways.items() if runs}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ------------------------------------------------------------------------------------------------------------ the text


def half_spacing(weight: float) -> float:
    """Half the distance between bfloat16 numbers (8 significant bits) of about this size: 2^(e - 8), 2^e <= weight."""
    return math.ldexp(1.0, math.frexp(weight)[1] - 1 - 8)


def told(values: Sequence[float], form: Callable[[float], str]) -> str:
    """The mean, and the range where it has a width in the digits shown."""
    low, high = form(min(values)), form(max(values))
    return form(mean(values)) + (f" ({low} to {high})" if low != high else "")


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def fall(run: Run) -> float:
    """How far the held-out loss fell from before the first step to after the last."""
    return run["rows"][0]["loss"] - run["rows"][-1]["loss"]


def looks(run: Run) -> list[dict[str, float]]:
    """The rows after a step: all but the first."""
    return run["rows"][1:]


def row(way: str, runs: list[Run]) -> list[str]:
    last = [run["rows"][-1] for run in runs]
    return [
        LABELS[way],
        str(len(runs)),
        told([r["loss"] for r in last], "{:.4f}".format),
        told([fall(run) for run in runs], "{:.4f}".format),
        told([r["accuracy"] for r in last], percent),
        told([mean([r["arrived"] for r in looks(run)]) for run in runs], percent),
        told([r["changed"] for r in last], percent),
    ]


def differences(ways: dict[str, list[Run]], one: str, other: str) -> str | None:
    """The final loss of `one` minus that of `other`, for each seed that both have run; None for no seed."""
    ends = {way: {run["seed"]: run["rows"][-1]["loss"] for run in ways.get(way, [])} for way in (one, other)}
    seeds = sorted(ends[one].keys() & ends[other].keys())
    if not seeds:
        return None
    values = ", ".join(f"{ends[one][seed] - ends[other][seed]:+.4f}".replace("-", "−") for seed in seeds)
    return f"{LABELS[one]} minus {LABELS[other]}: {values}"


def falls(ways: dict[str, list[Run]]) -> str | None:
    """The mean fall of the loss over that of float32, on the seeds that all ways have run; None without such a fall."""
    seeds = set.intersection(*({run["seed"] for run in ways.get(way, [])} for way in LABELS))
    means = {way: mean([fall(run) for run in ways[way] if run["seed"] in seeds]) for way in LABELS if seeds}
    if not means or means["float32"] <= 0:
        return None
    nearest, stochastic = (means[way] / means["float32"] for way in ("nearest", "stochastic"))
    return (
        f"Of the fall of the loss with float32 weights, bfloat16 weights make {100 * nearest:.0f} % with rounding to "
        f"nearest and {100 * stochastic:.0f} % with stochastic rounding."
    )


def conditions(record: dict[str, Any], ways: dict[str, list[Run]]) -> str:
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


def sizes(record: dict[str, Any]) -> str:
    """How large the updates are against what nearest rounding can lose."""
    median = record["settings"]["median_weight"]
    updates = [r["update"] for run in record["results"] for r in looks(run)]
    rms = math.sqrt(mean([u * u for u in updates]))
    return (
        f"The root mean square of a step's updates is {rms:.1e}. A weight of the median magnitude, {median:.3f}, rounded "
        f"to nearest, keeps its bits under any update below {half_spacing(median):.1e}, "
        f"{half_spacing(median) / rms:.0f} times as much."
    )


def rounding_part(record: dict[str, Any]) -> str:
    ways, every = runs_by_way(record), record["settings"]["every"]
    lines = [conditions(record, ways), "", sizes(record), ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD))]
    lines += ["| " + " | ".join(row(way, runs)) + " |" for way, runs in ways.items()]
    lines += ["", f"Mean (lowest to highest run) at the last step; what arrived: mean of every {every}th step."]
    pairs = [differences(ways, "nearest", "stochastic"), differences(ways, "stochastic", "float32")]
    of_float32 = falls(ways)
    if of_float32:
        lines += ["", of_float32]
    if any(pairs):
        lines += ["", "Final loss, seed by seed: " + "; ".join(pair for pair in pairs if pair) + "."]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- the picture


def curve(axes: Any, way: str, runs: list[Run], key: str, scale: float = 1.0) -> None:
    """The mean of the runs as a line, their range as a band; rows that lack `key` are left out."""
    rows = list(zip(*([r for r in run["rows"] if key in r] for run in runs), strict=True))
    steps, values = [at[0]["step"] for at in rows], [[scale * r[key] for r in at] for at in rows]
    line = {"linewidth": 1.8, "markersize": 3.5, **LINES[way]}
    axes.plot(steps, [mean(v) for v in values], label=f"{LABELS[way]} ({len(runs)})", zorder=3, **line)
    band = {"color": LINES[way]["color"], "alpha": 0.15, "linewidth": 0}
    axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], **band)


def draw(record: dict[str, Any]) -> None:
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.3), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for way, runs in runs_by_way(record).items():
        curve(left, way, runs, "loss")
        curve(right, way, runs, "arrived", 100)
    left.set_title("Held-out loss", loc="left", fontsize=10.5)
    right.set_title("Share of a step's update that the weights take on, %", loc="left", fontsize=10.5)
    right.set_ylim(0, 112)
    for axes in (left, right):
        axes.set_xlabel("steps", fontsize=9.5)
        axes.set_xlim(0, 1.015 * record["settings"]["steps"])  # the last markers whole
        axes.grid(axis="y", color="#e5e5e5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    handles, labels = left.get_legend_handles_labels()
    title = "weights and rounding of the update (runs): line, their mean; band, their range"
    figure.legend(handles, labels, title=title, loc="outside upper left", ncols=3, frameon=False, fontsize=9,
                  title_fontsize=8.5, alignment="left")  # fmt: skip
    save(figure, record, IMAGE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; say whether the page is up to date")
    args = parser.parse_args()
    record = load("rounding-cpu.json")
    if not args.check:
        draw(record)
    return update({"docs/placements.md": {"rounding": rounding_part(record)}}, "rounding_page.py", check=args.check)


if __name__ == "__main__":
    sys.exit(main())
