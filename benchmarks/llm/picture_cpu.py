"""Draws the picture of the runs on a CPU in docs/llm.md: accuracy against forwards, seconds and memory."""

from __future__ import annotations

from statistics import mean
from typing import Any

from benchmarks.convergence.page import COLOURS
from benchmarks.llm import stored_cpu
from benchmarks.llm.bench import CONTEXT
from benchmarks.llm.methods import METHODS
from benchmarks.llm.stored_cpu import ends
from benchmarks.parts import Record, panels, plain, save

PICTURE = "llm-cpu"
OTHERS = {
    "lora-mezo": "#000080", "prefix-mezo": "#9370db", "lora-adam": "#ffb347", "adam": "#ff69b4",
}  # fmt: skip


def picture() -> str:
    """The line that shows what draw() makes."""
    seen = "Accuracy against forwards, seconds and memory, on a CPU"
    return f"![{seen}](images/{PICTURE}.png)" if stored_cpu.ran() else stored_cpu.NONE


def draw() -> None:
    """Lines are means of the seeds, points their ends; in the third panel, means."""
    if stored_cpu.ran():
        save(drawn(), PICTURE, metadata={"Software": None})


def drawn() -> Any:
    """The figure. A method whose time was not measured is in the first panel alone."""
    figure, (forwards, seconds, memory) = panels(3, 15, 4.6)
    for name, method in stored_cpu.ran().items():
        first, backward = method["runs"][0], METHODS[name].backward
        look = {"color": {**COLOURS, **OTHERS}[name], "linewidth": 1.4}
        x, y = _line(name, method)
        for axes in (forwards, seconds) if name in stored_cpu.costs() else (forwards,):
            factor = 1.0 if axes is forwards else stored_cpu.step_seconds(name) * first["steps"] / first["forwards"]
            at = [factor * count for count in x]
            axes.plot(at, y, "--" if backward else "-", label=method["label"], **look)
            axes.plot([at[-1]] * len(method["runs"]), ends(method["runs"]), "o", markersize=3, **look)
        if name in stored_cpu.costs():
            held = stored_cpu.costs()[name]["bytes"] / 1e6
            memory.plot([held], [y[-1]], "s" if backward else "o", markersize=6, alpha=0.8, **look)
    if examples := stored_cpu.results()[CONTEXT]["runs"]:
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
    return figure


def _line(name: str, method: Record) -> tuple[list[int], list[float]]:
    """Forwards and the mean accuracy. Where a prefix begins, a model says other things than without one, unknown here."""
    points = method["runs"][0]["curve"]
    x = [point["forwards"] for point in points]
    y = [mean(ends(method["runs"], look)) for look in range(len(points))]
    if METHODS[name].adapter == "prefix":
        return x, y
    return [0, *x], [100 * stored_cpu.results()["start"]["test"]["accuracy"], *y]


PAGES = {"docs/llm.md": {"cpu-picture": picture}}
