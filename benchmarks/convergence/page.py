"""Writes the tables and the pictures of docs/convergence.md from benchmarks/results/convergence-cpu.json."""

from __future__ import annotations

import functools
import json
from statistics import mean, stdev
from typing import Any

from benchmarks.parts import Record, load, panels, plain, save, signed, table
from zokern.bench.plots import INK
from zokern.optim.registry import ENTRIES

TITLES = {"demo": "Sentence encoder, topics of docstrings", "lm": "Language model, from prose to code"}
AXES = {"forwards": "forwards (a forward and a backward of Adam: 3)", "seconds": "seconds of one core"}
COLOURS = {
    "mezo": "#000000", "mezo-onesided": "#7f7f7f", "lezo": "#e6194b", "hizoo": "#f58231", "helene": "#bfa500",
    "mezo-gv": "#3cb44b", "mezo-greedy": "#9acd32", "fzoo": "#008b8b", "es": "#42c5f5", "mezo-momentum": "#4363d8",
    "mezo-adam": "#911eb4", "mezo-adamezo": "#f032e6", "mezo-sign": "#9a6324", "mezo-rademacher": "#c2b280",
    "lowrank": "#8b4513", "lowrank-onesided": "#d2691e", "lowrank-es": "#000080",
}  # fmt: skip
FIRST_ORDER = "adam"
FAMILIES = {"mezo": ("mezo-onesided", "mezo-momentum", "mezo-adam"), "es": ("lowrank-es",)}  # on one method's page


@functools.cache
def stored() -> dict[str, Any]:
    record = load("convergence-cpu.json")
    if missing := TITLES.keys() - record["results"].keys():
        told = f"the stored results have no {missing.pop()}: run python -m benchmarks.convergence.run without --tasks"
        raise SystemExit(told)
    return record


# ---------------------------------------------------------------------------------------------------------- the tables


def _cells(method: Record, mezo: Record) -> list[str]:
    loss, differences = method["final"]["loss"], apart(method, mezo)
    cells = [method["label"], f"{method['lr']:.2g}", f"{loss['mean']:.3f} ± {loss['std']:.3f}"]
    cells.append("" if method is mezo else f"{signed(mean(differences), 3)} ± {stdev(differences):.3f}")
    if "accuracy" in method["final"]:
        share = method["final"]["accuracy"]
        cells.append(f"{100 * share['mean']:.1f} ± {100 * share['std']:.1f}")
    return [*cells, f"{method['forwards_per_step']}", f"{method['seconds']:.1f}"]


def apart(method: Record, other: Record) -> list[float]:
    """The difference of two methods' losses, seed by seed: the batches of a seed are the same for all methods."""
    pairs = zip(*(one["final"]["loss"]["each"] for one in (method, other)), strict=True)
    return [a - b for a, b in pairs]


def table_of(name: str) -> str:
    """The final figures of one task, the best method first, backpropagation last."""
    task = stored()["results"][name]
    methods, start = task["methods"], task["start"]["report"]
    scored = "accuracy" in start
    head = ["method", "lr", "held-out loss", "minus MeZO's, by seeds"]
    head += [*["accuracy, %"] * scored, "forwards a step", "seconds"]
    order = sorted(methods, key=lambda name: (name == FIRST_ORDER, methods[name]["final"]["loss"]["mean"]))
    before = ["before tuning", "", f"{start['loss']:.3f}", ""]
    before += [f"{100 * start['accuracy']:.1f}"] if scored else []
    rows = [*(_cells(methods[name], methods["mezo"]) for name in order), [*before, "", ""]]
    return table(head, rows, tight=True)


def machine() -> str:
    record = stored()
    m = record["machine"]
    return (
        f"Run on {m['threads']} thread of an {m['processor']} ({m['instruction_sets'][0]}), Python {m['python']}, "
        f"torch {m['torch']}, transformers {m['transformers']}, commit {record['commit'][:12]}, {record['date'][:10]}."
    )


def chosen() -> str:
    """Which of the settings that were tried besides lr was taken."""
    lines = []
    for name, task in stored()["results"].items():
        for method in task["methods"].values():
            tried = {json.dumps(point["settings"]): point["settings"] for point in method["grid"]}
            if len(tried) > 1:
                key = next(k for k in method["settings"] if len({s[k] for s in tried.values()}) > 1)
                values = ", ".join(f"{value[key]:g}" for value in tried.values())
                lines.append(f"- `{name}`, {method['label']}: {key} {method['settings'][key]:g} of {values}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------- the pictures


def _bounds(methods: Record, names: list[str], bands: bool) -> tuple[float, float]:
    """What of the loss is shown: all that the forward-only methods reach, and little of where one climbs."""
    curves = [methods[name]["curve"]["loss"] for name in names if name != FIRST_ORDER]
    start = curves[0][0]["mean"]
    lowest = min(point["mean"] - bands * point["std"] for curve in curves for point in curve)
    highest = max(start, *(curve[-1]["mean"] for curve in curves))
    margin = 0.08 * (highest - lowest)
    return lowest - margin, highest + 2 * margin


def _draw(axes: Any, methods: Record, names: list[str], against: str, bands: bool) -> None:
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
    axes.set_xlabel(AXES[against])
    plain(axes)


def draw_task(name: str, methods: Record) -> None:
    """All methods: held-out loss versus forwards and versus seconds."""
    figure, (left, right) = panels(2, 13, 5.6)
    for axes, against in ((left, "forwards"), (right, "seconds")):
        _draw(axes, methods, list(methods), against, bands=False)
    left.set_ylabel(f"held-out loss, mean of {len(stored()['settings']['seeds'])} seeds")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(TITLES[name], x=0.01, ha="left", fontsize=12)
    save(figure, f"convergence-{name}", metadata={"Software": None})


def draw_seeds() -> None:
    """Each seed's loss minus that of MeZO with the same seed: a point each, a bar for the mean."""
    figure, at = panels(len(TITLES), 13, 5.6)
    for axes, (name, title) in zip(at, TITLES.items(), strict=True):
        methods = stored()["results"][name]["methods"]
        order = sorted(methods.keys() - {"mezo", FIRST_ORDER}, key=lambda one: -methods[one]["final"]["loss"]["mean"])
        axes.axvline(0, color=INK, linewidth=0.8)
        for y, method in enumerate(order):
            x = apart(methods[method], methods["mezo"])
            axes.plot(x, [y] * len(x), "o", color=COLOURS[method], markersize=5, alpha=0.7)
            axes.plot([mean(x)], [y], "|", color=COLOURS[method], markersize=16, markeredgewidth=2.5)
        axes.set_yticks(range(len(order)), [methods[method]["label"] for method in order])
        axes.set_xlabel("held-out loss minus MeZO's of the same seed; left is better")
        axes.set_title(title, loc="left", fontsize=10)
        plain(axes)
        axes.grid(visible=False)
    save(figure, "convergence-seeds", metadata={"Software": None})


def draw_method(method: str, tasks: Record) -> None:
    """One method, and its options, against MeZO, versus forwards, on the tasks that it has finished.

    With a band of one deviation, where there are few lines.
    """
    tasks = {name: task["methods"] for name, task in tasks.items() if method in task["methods"]}
    figure, at = panels(len(tasks), 4.5 * len(tasks), 3.4)
    for axes, (name, methods) in zip(at, tasks.items(), strict=True):
        names = [n for n in dict.fromkeys(("mezo", method, *FAMILIES.get(method, ()), FIRST_ORDER)) if n in methods]
        _draw(axes, methods, names, "forwards", bands=method not in FAMILIES)
        axes.set_title(TITLES[name], loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    at[0].set_ylabel("held-out loss")
    save(figure, f"convergence-{method}", metadata={"Software": None})


def draw() -> None:
    tasks = stored()["results"]
    for name, task in tasks.items():
        draw_task(name, task["methods"])
    draw_seeds()
    for method in ENTRIES:  # those with a page of their own
        draw_method(method, tasks)


TABLES = {name: functools.partial(table_of, name) for name in TITLES}
PAGES = {"docs/convergence.md": {"machine": machine, "chosen": chosen, **TABLES}}
