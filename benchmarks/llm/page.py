"""Writes the tables and the picture of docs/llm.md from the llm-cuda.json of each GPU."""

from __future__ import annotations

import functools
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.convergence.page import COLOURS
from benchmarks.llm.run import METHODS
from benchmarks.parts import Record, load, made_on, panels, plain, save, table

SHARES = (1 / 12, 1 / 4, 1 / 2, 1)  # of the budget, at which the table looks


@functools.cache
def stored(gpu: str = "") -> dict[str, Any]:
    """gpu: the folder of results of another GPU than the first."""
    return load(str(Path(gpu, "llm-cuda.json")))


def finished(gpu: str = "") -> dict[str, Record]:
    """The methods with a whole run, and their whole runs."""
    found = {}
    for name, part in stored(gpu)["results"].items():
        if name in METHODS and (whole := [run for run in part["runs"] if not run["cut"]]):
            found[name] = {**part, "runs": whole}
    return dict(sorted(found.items(), key=lambda item: -at(item[1], 1)))


def at(method: Record, share: float) -> float:
    """Mean accuracy of the seeds after a share of the budget, at the look that is nearest."""
    looks = [min(run["curve"], key=lambda point: abs(point["step"] - share * run["steps"])) for run in method["runs"]]
    return float(mean(look["accuracy"] for look in looks))


def runs(gpu: str = "") -> str:
    """A line for each method."""
    budget = stored(gpu)["settings"]["budget"]
    head = ["method", "lr", *(f"{budget * share:,.0f}" for share in SHARES), "seeds", "ms a step", "seconds in all"]
    rows = []
    for method in finished(gpu).values():
        step = mean(run["seconds_per_step"] for run in method["runs"])
        steps = method["runs"][0]["steps"]
        shown = [f"{100 * at(method, share):.1f}" for share in SHARES]
        seeds = str(len(method["runs"]))
        rows.append([method["label"], f"{method['lr']:g}", *shown, seeds, f"{1e3 * step:.2f}", f"{steps * step:.0f}"])
    start = f"{100 * stored(gpu)['results']['start']['test']['accuracy']:.1f}"
    rows.append(["before tuning", "", *[start] * len(SHARES), "", "", ""])
    return table(head, rows, tight=True)


def grids(gpu: str = "") -> str:
    """The validation loss of each lr that was tried."""
    lines = []
    for method in finished(gpu).values():
        tried = ", ".join(
            f"{p['lr']:g}: {p['loss']:.3f}" if p["loss"] else f"{p['lr']:g}: none" for p in method["grid"]
        )
        lines.append(f"- {method['label']}: {tried}")
    return "\n".join(lines)


def machine(gpu: str = "") -> str:
    where, missing = stored(gpu), [part.label for name, part in METHODS.items() if name not in finished(gpu)]
    told = f" The time ended before these: {'; '.join(missing)}." if missing else ""
    return f"{made_on(where)}.{told}"


def draw() -> None:
    """Accuracy against forwards and against seconds, each seed a line."""
    figure, (left, right) = panels(2, 11, 4.2)
    for name, method in finished().items():
        for run in method["runs"]:
            y = [100 * point["accuracy"] for point in run["curve"]]
            steps = [point["step"] for point in run["curve"]]
            label = method["label"] if run is method["runs"][0] else None
            for axes, unit in ((left, method["forwards_per_step"]), (right, run["seconds_per_step"])):
                axes.plot([unit * step for step in steps], y, color=COLOURS[name], label=label, linewidth=1.4)
    left.set_xlabel("forwards")
    right.set_xlabel("seconds of training on the GPU")
    left.set_ylabel("accuracy on 1,000 held-out sentences, %")
    for axes in (left, right):
        plain(axes)
    right.legend(frameon=False, fontsize=8, loc="lower left")
    save(figure, "llm-cuda", metadata={"Software": None})


LONGER = "h200"  # where lr was chosen in longer runs
PARTS = {"runs": runs, "grids": grids, "machine": machine}
PAGES = {
    "docs/llm.md": {**PARTS, **{f"longer-{name}": functools.partial(make, LONGER) for name, make in PARTS.items()}}
}
