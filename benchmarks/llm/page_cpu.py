"""Writes the CPU's tables and picture of docs/llm.md from benchmarks/results/llm-cpu.json and llm-cost-cpu.json.

Also from what is there of them: what is missing is said.
"""

from __future__ import annotations

import functools
from statistics import mean, stdev
from typing import Any

from benchmarks.convergence.page import COLOURS
from benchmarks.convergence.run import SEEDS
from benchmarks.llm.bench import CONTEXT
from benchmarks.llm.claims import ARXIV, CLAIMS, against, said
from benchmarks.llm.methods import METHODS
from benchmarks.llm.search import best, falls_back, next_lr
from benchmarks.parts import Record, load, made_on, panels, plain, save, table
from zokern.bench.record import RESULTS

RUNS, COST, PICTURE = "llm-cpu.json", "llm-cost-cpu.json", "llm-cpu"
NONE = "No run is stored yet."
OTHERS = {
    "lowrank": "#8b4513",
    "lora-mezo": "#000080",
    "prefix-mezo": "#9370db",
    "lora-adam": "#b0b0b0",
    "adam": "#d3d3d3",
}


@functools.cache
def stored(name: str) -> dict[str, Any]:
    """A results file; {} where it is not there yet."""
    return load(name) if (RESULTS / name).is_file() else {}


def results() -> dict[str, Any]:
    found: dict[str, Any] = stored(RUNS).get("results", {})
    return found


def _methods() -> dict[str, Record]:
    """The methods with a run, the most accurate first, backpropagation last."""
    found = {name: part for name, part in results().get("methods", {}).items() if name in METHODS and part["runs"]}
    return dict(sorted(found.items(), key=lambda one: (METHODS[one[0]].backward, -mean(ends(one[1])))))


def ends(method: Record, look: int = -1) -> list[float]:
    """Of each seed, the accuracy at a look of its curve, in %."""
    return accuracies(method["runs"], look)


def accuracies(runs: list[Record], look: int = -1) -> list[float]:
    return [100 * run["curve"][look]["accuracy"] for run in runs]


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation, 1/(N - 1); of one value itself."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e8 else f"{count / 1e9:.2f} GB"


def _cost(name: str, steps: int) -> list[str]:
    """Seconds a step and of all steps, and memory beside a forward."""
    found = stored(COST).get("results", {}).get(name)
    if found is None:
        return ["", "", ""]
    seconds, extra = found["seconds"], max(found["bytes"] - found["forward_bytes"], 0)
    return [f"{seconds:.2f}", f"{steps * seconds:.0f}", megabytes(extra)]


def runs() -> str:
    """A line for each method."""
    found = results()
    if "start" not in found:
        return NONE
    budget = stored(RUNS)["settings"]["budget"]
    head = ["method", "lr", "forwards", f"accuracy after {budget // 2}, %", f"after {budget}, %", "seeds", "seconds a step",
            "of all steps", "memory beside a forward"]  # fmt: skip
    rows = []
    for name, method in _methods().items():
        curve = [spread(ends(method, look)) for look in (0, -1)]
        first, seeds = method["runs"][0], str(len(method["runs"]))
        costs = _cost(name, first["steps"])
        rows.append([method["label"], f"{method['lr']:g}", str(first["forwards"]), *curve, seeds, *costs])
    if examples := found[CONTEXT]["runs"]:
        shown = spread([100 * run["accuracy"] for run in examples])
        rows.append(
            [f"{found[CONTEXT]['examples']} examples in the prompt", "", "0", "", shown, str(len(examples)), *[""] * 3]
        )
    rows.append(["as it is (zero-shot)", "", "0", "", f"{100 * found['start']['test']['accuracy']:.1f}", *[""] * 4])
    return table(head, rows, tight=True)


def papers() -> str:
    """What each paper reports, and what was found here."""
    found = results().get("methods", {})
    if not found.get("mezo", {}).get("runs"):
        return NONE
    rows = []
    for name, (number, year, claim) in CLAIMS.items():
        here = ["", ""]
        if name == "mezo":
            here = ["the measure"] * 2
        elif name in found:
            loss, accuracy = (against(found[name], found["mezo"], key) for key in ("loss", "accuracy"))
            here = [said(loss, 1, 3), said(accuracy, 100, 1)]
        rows.append([METHODS[name].label, f"[{year}]({ARXIV}{number}): {claim}", *here])
    head = ["method", "its paper reports", "here: loss minus MeZO's", "points minus MeZO's"]
    return table(head, rows, tight=True)


def _losses(runs: list[Record], look: int = -1) -> str:
    losses = [run["curve"][look]["loss"] for run in runs]
    return "none" if None in losses else spread(losses, 3)


def lowered() -> str:
    """The methods whose mean loss rose in the second half, beside the next lower lr."""
    budget = stored(RUNS)["settings"]["budget"] if results() else 0
    half = f"loss after {budget // 2}"
    head = ["method", "lr", half, f"after {budget}", "accuracy, %", "next lower lr", half, f"after {budget}", "accuracy, %",
            "seeds"]  # fmt: skip
    rows = []
    for method in _methods().values():
        if found := method.get("lower"):
            rows.append([method["label"]])
            for some in (method["runs"], found):
                rows[-1] += [f"{some[0]['lr']:g}", _losses(some, 0), _losses(some), spread(accuracies(some))]
            rows[-1].append(str(len(found)))
    if not rows:
        return "No method's mean loss rose." if results() and not missing() else NONE
    return table(head, rows, tight=True)


def grids() -> str:
    """The validation loss of each lr that was tried."""
    lines = []
    for name, method in results().get("methods", {}).items():
        if name not in METHODS or not method["grid"]:
            continue
        grid = sorted(method["grid"], key=lambda point: point["lr"])
        tried = ", ".join(f"{p['lr']:g}: {'none' if p['loss'] is None else format(p['loss'], '.3f')}" for p in grid)
        done = next_lr(METHODS[name].grid, method["grid"]) is None
        chosen = f"; taken: {best(method['grid']):g}" if done else "; not done"
        lines.append(f"- {method['label']}: {tried}{chosen}")
    return "\n".join(lines) or NONE


def _processors() -> list[str]:
    """That runs were done on."""
    found = results()
    runs = [run for method in found["methods"].values() for run in [*method["grid"], *method["runs"]]]
    return sorted({run["processor"] for run in [*runs, *found[CONTEXT]["runs"]]})


def missing() -> str:
    """What is not there yet; "" for nothing."""
    found = results().get("methods", {})
    seeds = {name: len(found.get(name, {"runs": []})["runs"]) for name in METHODS}
    none = [METHODS[name].label for name, count in seeds.items() if count == 0]
    some = [f"{METHODS[name].label} ({count})" for name, count in seeds.items() if 0 < count < len(SEEDS)]
    told = f" **Not run yet: {'; '.join(none)}.**" if none else ""
    told += f" **Not all {len(SEEDS)} seeds yet: {'; '.join(some)}.**" if some else ""
    again = [(name, part.get("lower", [])) for name, part in found.items() if seeds.get(name) == len(SEEDS)]
    less = [f"{METHODS[name].label} ({len(some)})" for name, some in again
            if len(some) < len(SEEDS) and falls_back(found[name]["runs"])]  # fmt: skip
    told += f" **Not all {len(SEEDS)} seeds with a lower lr yet: {'; '.join(less)}.**" if less else ""
    costs = stored(COST).get("results", {})
    if unmeasured := [METHODS[name].label for name in METHODS if name not in costs]:
        told += f" **Time and memory not measured yet: {'; '.join(unmeasured)}.**"
    return told


def machine() -> str:
    if "start" not in results():
        return NONE
    told = made_on(stored(RUNS))
    if len(processors := _processors()) > 1:
        told += f"; in pieces, on {' and '.join(processors)}"
    if stored(COST):
        told += f"; time and memory in processes of their own, commit {stored(COST)['commit'][:12]}"
    return f"{told}.{missing()}"


def picture() -> str:
    """The line that shows what draw() makes."""
    seen = "Accuracy against forwards, seconds and memory, on a CPU"
    return f"![{seen}](images/{PICTURE}.png)" if _methods() else NONE


def draw() -> None:
    """Accuracy against forwards and seconds of steps, means of the seeds and each seed's end; its end against memory."""
    if not _methods():
        return
    figure, (forwards, seconds, memory) = panels(3, 15, 4.6)
    start, costs = 100 * results()["start"]["test"]["accuracy"], stored(COST).get("results", {})
    for name, method in _methods().items():
        first, backward = method["runs"][0], METHODS[name].backward
        look = {"color": {**COLOURS, **OTHERS}[name], "linewidth": 1.4}
        # Where a prefix begins, a model says other things than without one; nobody has looked.
        known = METHODS[name].adapter != "prefix"
        x = [0] * known + [point["forwards"] for point in first["curve"]]
        y = [start] * known + [mean(ends(method, at)) for at in range(len(first["curve"]))]
        for axes in (forwards, seconds) if name in costs else (forwards,):
            factor = 1.0 if axes is forwards else costs[name]["seconds"] * first["steps"] / first["forwards"]
            at = [factor * count for count in x]
            axes.plot(at, y, "--" if backward else "-", label=method["label"], **look)
            axes.plot([at[-1]] * len(method["runs"]), ends(method), "o", markersize=3, **look)
        if name in costs:
            memory.plot([costs[name]["bytes"] / 1e6], [y[-1]], "s" if backward else "o", markersize=6, **look)
    if examples := results()[CONTEXT]["runs"]:
        level = mean(100 * run["accuracy"] for run in examples)
        for axes in (forwards, seconds, memory):
            axes.axhline(level, color="#cccccc", linestyle=":", label="16 examples in the prompt")
    forwards.set_xlabel("forwards (a forward and a backward: 3)")
    forwards.set_ylabel("accuracy on 1,000 held-out sentences, %")
    seconds.set_xlabel("seconds of all steps")
    memory.set_xlabel("memory of a step beside the weights, MB")
    memory.set_xscale("log")
    memory.set_ylim(forwards.get_ylim())
    for axes in (forwards, seconds, memory):
        plain(axes)
    figure.legend(*forwards.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right center")
    save(figure, PICTURE, metadata={"Software": None})


PAGES = {
    "docs/llm.md": {
        "cpu-runs": runs,
        "cpu-picture": picture,
        "cpu-papers": papers,
        "cpu-lower": lowered,
        "cpu-grids": grids,
        "cpu-machine": machine,
    },
}
