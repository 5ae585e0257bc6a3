"""Writes the tables and the pictures of docs/convergence.md from benchmarks/results/convergence-cpu.json.

python benchmarks/convergence_page.py           # rewrites the tables and draws docs/images/convergence-*.png
python benchmarks/convergence_page.py --check   # exit code 1 if the page's tables are not what this would write
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from pages import ROOT, load, update

IMAGES = ROOT / "docs" / "images"
TITLES = {"demo": "Sentence encoder, topics of docstrings", "lm": "Language model, from prose to code"}
INK = "#444444"
COLOURS = {
    "mezo": "#000000",
    "mezo-onesided": "#7f7f7f",
    "lezo": "#e6194b",
    "hizoo": "#f58231",
    "helene": "#bfa500",
    "mezo-gv": "#3cb44b",
    "mezo-greedy": "#9acd32",
    "fzoo": "#008b8b",
    "es": "#42c5f5",
    "mezo-momentum": "#4363d8",
    "mezo-adam": "#911eb4",
    "mezo-adamezo": "#f032e6",
    "mezo-sign": "#9a6324",
}
FIRST_ORDER = "adam"


# ---------------------------------------------------------------------------------------------------------- the tables


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _cells(method: dict[str, Any], mezo: dict[str, Any]) -> list[str]:
    loss, other = method["final"]["loss"], mezo["final"]["loss"]
    cells = [method["label"], f"{method['lr']:.2g}", f"{loss['mean']:.3f} ± {loss['std']:.3f}"]
    cells.append("" if method is mezo else _signed(loss["mean"] - other["mean"], 3))
    if "accuracy" in method["final"]:
        share = method["final"]["accuracy"]
        cells.append(f"{100 * share['mean']:.1f} ± {100 * share['std']:.1f}")
    return [*cells, f"{method['forwards_per_step']}", f"{method['seconds']:.1f}"]


def table(task: dict[str, Any]) -> str:
    """The final figures of one task, the best method first, backpropagation last."""
    methods, start = task["methods"], task["start"]["report"]
    head = ["method", "lr", "held-out loss", "minus MeZO's"]
    head += ["accuracy, %"] if "accuracy" in start else []
    head += ["forwards a step", "seconds"]
    order = sorted(methods, key=lambda name: (name == FIRST_ORDER, methods[name]["final"]["loss"]["mean"]))
    rows = [_cells(methods[name], methods["mezo"]) for name in order]
    before = ["before tuning", "", f"{start['loss']:.3f}", ""]
    before += [f"{100 * start['accuracy']:.1f}"] if "accuracy" in start else []
    rows.append([*before, "", ""])
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def machine(record: dict[str, Any]) -> str:
    m = record["machine"]
    return (
        f"Run on {m['threads']} thread of an {m['processor']} ({m['instruction_sets'][0]}), Python {m['python']}, "
        f"torch {m['torch']}, transformers {m['transformers']}, commit {record['commit'][:12]}, {record['date'][:10]}."
    )


def chosen(record: dict[str, Any]) -> str:
    """Which of the settings that were tried besides lr was taken."""
    lines = []
    for name, task in record["results"].items():
        for method in task["methods"].values():
            tried = {json.dumps(point["settings"]): point["settings"] for point in method["grid"]}
            if len(tried) > 1:
                key = next(k for k in method["settings"] if len({s[k] for s in tried.values()}) > 1)
                values = ", ".join(f"{value[key]:g}" for value in tried.values())
                lines.append(f"- `{name}`, {method['label']}: {key} {method['settings'][key]:g} of {values}")
    return "\n".join(lines)


def parts_of(record: dict[str, Any]) -> dict[str, str]:
    """What lies between the page's markers."""
    missing = {"demo", "lm"} - record["results"].keys()
    if missing:
        raise SystemExit(
            f"the stored results have no {missing.pop()}: run benchmarks/bench_convergence.py without --tasks"
        )
    parts = {"machine": machine(record), "chosen": chosen(record)}
    return parts | {name: table(task) for name, task in record["results"].items()}


# -------------------------------------------------------------------------------------------------------- the pictures


def _bounds(methods: dict[str, Any], names: list[str], bands: bool) -> tuple[float, float]:
    """What of the loss is shown: all that the forward-only methods reach, and little of where one climbs."""
    curves = [methods[name]["curve"]["loss"] for name in names if name != FIRST_ORDER]
    start = curves[0][0]["mean"]
    lowest = min(point["mean"] - bands * point["std"] for curve in curves for point in curve)
    highest = max(start, *(curve[-1]["mean"] for curve in curves))
    margin = 0.08 * (highest - lowest)
    return lowest - margin, highest + 2 * margin


def _draw(axes: Any, methods: dict[str, Any], names: list[str], against: str, bands: bool) -> None:
    for name in names:
        curve = methods[name]["curve"]
        x, y = curve[against], [point["mean"] for point in curve["loss"]]
        first_order, mezo = name == FIRST_ORDER, name == "mezo"
        colour = INK if first_order else COLOURS[name]
        label = methods[name]["label"] + (f", ends at {y[-1]:.2f}" if first_order else "")
        axes.plot(x, y, color=colour, label=label, linestyle="--" if first_order else "-",
                  linewidth=2.6 if mezo else 1.6, zorder=3 if mezo else 2)  # fmt: skip
        if bands and not first_order:
            low, high = ([p["mean"] + sign * p["std"] for p in curve["loss"]] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(*_bounds(methods, names, bands))
    if against == "seconds":  # backpropagation or a slow method must not squeeze the rest
        axes.set_xlim(left=0)
    axes.set_xlabel(
        "forwards (a forward and a backward of Adam: 3)" if against == "forwards" else "seconds of one core"
    )
    axes.grid(axis="y", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def _figure(columns: int, width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: Any, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / f"convergence-{name}.png", metadata={"Software": None})


def draw_task(name: str, task: dict[str, Any]) -> None:
    """All methods: held-out loss versus forwards and versus seconds."""
    figure, (left, right) = _figure(2, 13, 5.6)
    methods = task["methods"]
    for axes, against in ((left, "forwards"), (right, "seconds")):
        _draw(axes, methods, list(methods), against, bands=False)
    left.set_ylabel("held-out loss, mean of three seeds")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(TITLES[name], x=0.01, ha="left", fontsize=12)
    _save(figure, name)


def draw_method(method: str, tasks: dict[str, Any]) -> None:
    """One method against MeZO, versus forwards, on the tasks that it has finished."""
    tasks = {name: task for name, task in tasks.items() if method in task["methods"]}
    figure, panels = _figure(len(tasks), 4.5 * len(tasks), 3.4)
    for axes, (name, task) in zip(panels, tasks.items(), strict=True):
        names = [n for n in dict.fromkeys(("mezo", method, FIRST_ORDER)) if n in task["methods"]]
        _draw(axes, task["methods"], names, "forwards", bands=True)
        axes.set_title(TITLES[name], loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("held-out loss")
    _save(figure, method)


def draw(record: dict[str, Any]) -> None:
    tasks = record["results"]
    for name, task in tasks.items():
        draw_task(name, task)
    for method in dict.fromkeys(method for task in tasks.values() for method in task["methods"]):
        if method != FIRST_ORDER:
            draw_method(method, tasks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; say whether the tables are up to date")
    args = parser.parse_args()
    record = load("convergence-cpu.json")
    if not args.check:
        draw(record)
    return update({"docs/convergence.md": parts_of(record)}, "convergence_page.py", check=args.check)


if __name__ == "__main__":
    sys.exit(main())
