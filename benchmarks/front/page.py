"""README's one figure and the sentence below it: a step beside the published order of work, and memory beside Adam."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.convergence.page import FIRST_ORDER
from benchmarks.convergence.page import stored as convergence
from benchmarks.memory import formulas
from benchmarks.memory.page import ITEM, TOKENS, weights
from benchmarks.memory.shapes import LARGE
from benchmarks.parts import gpus, load, panels, plain, save, short_gpu, table
from zokern.bench.plots import BLUE, GREEN, INK, ORANGE, RED

PUBLISHED = "published"
SHAPE, MODEL = "13B", "Llama-2-13B"
LONG = (16, 256)  # rows and tokens of the picture's memory
MEMORY = {
    "inference": ("inference", INK),
    "stream": ("zokern, its default", BLUE),
    "LoRA, Adam": ("LoRA, Adam", ORANGE),
    "Adam, all bfloat16": ("Adam, all in bfloat16", RED),
    "Adam, mixed": ("Adam, mixed precision", RED),
}  # {a way of benchmarks/memory: its name here, its colour}


stored = functools.cache(load)


@dataclass(frozen=True)
class Step:
    """A case of `zokern bench step`: its file, its name there, our placement, the model; whether its graph is shown."""

    file: str
    case: str
    ours: str
    told: str
    graph: bool = False

    def seconds(self, way: str) -> float:
        return float(self._of(way)["step"]["median"])

    def passes(self, way: str) -> float | None:
        """Seconds of the passes; None of a graph, which has no parts."""
        one = self._of(way)
        return float(one["passes"]) if "passes" in one else None

    def faster(self, way: str = "") -> float:
        return self.seconds(PUBLISHED) / self.seconds(way or self.ours)

    def ways(self) -> dict[str, str]:
        """{way: what it is called}"""
        return {PUBLISHED: "MeZO's way", self.ours: "zokern"} | ({GRAPH: "as one CUDA graph"} if self.graph else {})

    def tokens(self) -> str:
        return self.case.split()[1].replace("x", " x ")

    def where(self) -> str:
        run = stored(self.file)
        return short_gpu(run) if "gpu" in run["machine"] else f"{run['machine']['threads']} CPU cores"

    def _of(self, way: str) -> Any:
        return stored(self.file)["results"][f"{self.case} mezo {way}"]


STEPS = (
    Step("step-cuda-opt-13b-16x40.json", "opt-13b 16x40", "stream", "OPT-13B"),
    Step("step-cuda-opt-1.3b.json", "opt-1.3b 16x32", "stream", "OPT-1.3B", graph=True),
    Step("step-cpu.json", "demo 16x32", "inplace", "a 23M encoder"),
)  # each with the placement that is its default
LONGER = Step("step-cuda-opt-13b.json", "opt-13b 16x256", "stream", "OPT-13B")
GRAPH = "graphed"


def gigabytes(way: str, tokens: tuple[int, int] = LONG) -> float:
    """Weights in bfloat16 and what comes beside them, by the formulas."""
    shape = LARGE[SHAPE]
    return (weights(shape, ITEM) + formulas.COMPUTED[way](shape, *tokens, ITEM)) / 1e9


def sentence() -> str:
    large, small, cpu = STEPS
    here, there = (f"{1e3 * large.seconds(way):.0f}" for way in (large.ours, PUBLISHED))
    size = {way: f"{gigabytes(way):.0f}" for way in MEMORY}
    (rows, length), (few, short) = LONG, TOKENS[0]
    texts = large.case.split()[1].replace("x", " texts of ")
    return (
        f"On an {large.where()}, a MeZO step of {large.told} with {texts} tokens takes {here} ms. Done as MeZO's code "
        f"does it, in plain PyTorch, it takes {there}: **{large.faster():.1f} times as long**. "
        f"It is {LONGER.faster():.1f} times with {LONGER.tokens()} tokens, whose forwards take more. "
        f"For {small.told} with {small.tokens()} tokens it is {small.faster():.1f} times, and {small.faster(GRAPH):.1f} "
        f"with our step as [one CUDA graph](docs/graphs.md); for {cpu.told} with {cpu.tokens()} tokens on "
        f"{cpu.where()}, {cpu.faster():.1f} ([steps](docs/steps.md)).\n\n"
        f"{MODEL} in bfloat16 with {rows} x {length} tokens is tuned in {size['stream']} GB, where inference takes "
        f"{size['inference']}. Without checkpointing LoRA with Adam takes {size['LoRA, Adam']}, and "
        f"{gigabytes('LoRA, Adam', TOKENS[0]):.0f} with {few} x {short} tokens; Adam {size['Adam, all bfloat16']} to "
        f"{size['Adam, mixed']}. This is computed; the formulas were held against measurements on a CPU, in float32 "
        "and up to 135 million parameters, those of our placements in bfloat16 and up to 1.3 billion "
        "([memory](docs/memory.md))."
    )


def honest() -> str:
    """Backpropagation beside all others, on the demo's model with the same number of forwards."""
    demo = convergence()["results"]["demo"]
    ends = {name: 100 * one["final"]["accuracy"]["mean"] for name, one in demo["methods"].items()}
    adam, start = ends.pop(FIRST_ORDER), 100 * demo["start"]["report"]["accuracy"]
    return (
        "**If backpropagation fits in your memory, use it: it learns more per forward.** With a 23M encoder, "
        f"{demo['budget']} forwards of Adam take the share of right "
        f"answers from {start:.0f} to {adam:.1f} %, and those of forward-only methods to {min(ends.values()):.0f} to "
        f"{max(ends.values()):.0f} % ([the study](docs/convergence.md); a backward counts as two forwards)."
    )


def draw() -> None:
    figure, (left, right) = panels(2, 10.5, 4.0)
    places, labels, top = [], [], 0.0
    for one in STEPS:
        whole = one.seconds(PUBLISHED)
        title = f"{one.told}, {one.tokens()} tokens, {one.where()}"
        left.text(0.005, top + 0.6, title, fontsize=8.5, weight="bold", color=INK)
        for way, name in one.ways().items():
            seconds, passes = one.seconds(way), one.passes(way)
            if passes is None:
                left.barh(top, seconds / whole, color=GREEN)
            else:
                left.barh(top, (seconds - passes) / whole, color=BLUE)
                left.barh(top, passes / whole, left=(seconds - passes) / whole, color=ORANGE)
            note = f"{1e3 * seconds:,.0f} ms" + ("" if way == PUBLISHED else f", {one.faster(way):.1f} times as fast")
            left.text(seconds / whole + 0.015, top, note, va="center", fontsize=8)
            places.append(top)
            labels.append(name)
            top -= 1
        top -= 1.3
    left.set_yticks(places, labels, fontsize=8)
    left.set_xlim(0, 1.15)
    left.set_ylim(top=1.1)
    left.set_xlabel("time of a MeZO step, over that of MeZO's way", fontsize=9)
    for colour, what in ((BLUE, "forwards"), (ORANGE, "passes over the weights"), (GREEN, "all in one graph")):
        left.barh([0], [0], color=colour, label=what)
    left.legend(frameon=False, fontsize=8, loc="lower center", ncols=3, bbox_to_anchor=(0.5, 1))
    sizes = [gigabytes(way) for way in MEMORY]
    right.barh([-i for i in range(len(MEMORY))], sizes, color=[colour for _, colour in MEMORY.values()])
    for i, size in enumerate(sizes):
        right.text(size + 3, -i, f"{size:.0f}", va="center", fontsize=8)
    right.set_yticks([-i for i in range(len(MEMORY))], [told for told, _ in MEMORY.values()], fontsize=8)
    right.set_xlim(0, 1.15 * max(sizes))
    right.set_xlabel(f"GB to tune {MODEL}, {LONG[0]} x {LONG[1]} tokens, computed", fontsize=9)
    for axes in (left, right):
        plain(axes, labelsize=8)
        axes.grid(visible=False)
    save(figure, "front", metadata={"Software": None})


def gpu_rows() -> str:
    """Each GPU that the suite has run on."""
    rows = []
    for folder in gpus().values():
        truth, equal = (
            json.loads((folder / name).read_text()) for name in ("gpu-suite-truth.json", "equality-cuda.json")
        )
        wrong = sum(row["different"] for row in equal["results"])
        timed = sorted({model for path in folder.glob("step-cuda-*.json") for model in _models(path)})
        what = (
            f"bits of {equal['settings']['compared']} kinds of passes: {f'{wrong} differ' if wrong else 'none differs'}"
        )
        what += f" from the CPU's; steps of {' and '.join(timed)}"
        rows.append([truth["gpu"]["name"], what, truth["date"][:10], f"`{truth['commit'][:7]}`"])
    told = table(["GPU", "what", "date", "commit"], rows, tight=True)
    return f"{told}\n\nMore of it: [what has run on a GPU](docs/passes.md#what-has-run-on-a-gpu)."


def _models(path: Path) -> set[str]:
    return {name.split()[0].replace("opt", "OPT").replace("b", "B") for name in json.loads(path.read_text())["results"]}


PAGES = {"README.md": {"front": sentence, "honest": honest, "gpus": gpu_rows}}
