"""docs/memory.md, from results/memory-cpu.json and the formulas: tables, and the picture."""

from __future__ import annotations

import functools
from statistics import median
from typing import Any

from benchmarks.memory import formulas
from benchmarks.memory.run import TOKENS, key
from benchmarks.memory.shapes import LARGE, SMALL, Shape
from benchmarks.parts import load, made_on, panels, plain, save, signed, table
from zokern.bench.plots import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY

ITEM = 2  # bytes of bfloat16, which the large models are computed in
LABELS = {
    "inference": "inference",
    "inplace": "MeZO, `inplace`",
    "forward": "MeZO, `forward`, rank 1",
    "stream": "MeZO, `stream`",
    "shadow": "MeZO, `shadow`",
    "LoRA, Adam": "LoRA, Adam by backpropagation",
    "Adam": "Adam by backpropagation",
    "Adam, all bfloat16": "Adam by backpropagation, all in bfloat16",
    "Adam, mixed": "Adam by backpropagation, float32 moments and weights beside",
}
COLOURS = dict(
    zip(formulas.COMPUTED, (BLACK, BLUE, SKY, GREEN, PINK, ORANGE, RED, "#8b0000"), strict=True)
)  # of the bars
LARGEST = "135M"


@functools.cache
def stored() -> dict[str, Any]:
    return load("memory-cpu.json")


def weights(shape: Shape, item: int = formulas.FLOAT) -> int:
    return shape.parameters * item


def compared() -> list[tuple[str, tuple[int, int], str, int, int]]:
    """Of each measurement: model, tokens, way, and bytes beside the weights, measured and computed."""
    return [
        (name, (rows, length), way, stored()["results"][key(name, rows, length, way)]["extra"],
         formula(shape, rows, length, formulas.FLOAT))
        for name, shape in SMALL.items() for rows, length in TOKENS for way, formula in formulas.MEASURED.items()
    ]  # fmt: skip


def measured() -> str:
    """SMALL's largest: MiB."""
    shape = SMALL[LARGEST]
    rows = []
    for way in formulas.MEASURED:
        cells = [LABELS[way]]
        for tokens in TOKENS:
            extra = stored()["results"][key(LARGEST, *tokens, way)]["extra"]
            cells += [f"{extra / 2**20:,.0f}", f"{(weights(shape) + extra) / 2**20:,.0f}"]
        rows.append(cells)
    head = ["way", *(f"{r} x {n}: {what}" for r, n in TOKENS for what in ("beside the weights", "with them"))]
    note = (
        f"{made_on(stored())}; {shape.parameters / 1e6:.1f} million parameters, {weights(shape) / 2**20:,.0f} MiB in "
        f"float32; MiB. The process itself is not in it: Python and the libraries, some {_libraries():,.0f} MiB."
    )
    return f"{note}\n\n{table(head, rows)}"


def _libraries() -> float:
    """MiB that are held beside the weights before anything is done."""
    found = stored()["results"].items()
    return median((one["resident"] - weights(SMALL[name.split()[0]])) / 2**20 for name, one in found)


def errors() -> str:
    """Computed against measured, for each model: a line a way."""
    rows = []
    for way in formulas.MEASURED:
        cells = [LABELS[way]]
        for name, shape in SMALL.items():
            for tokens in TOKENS:
                ((real, made),) = [(a, b) for n, t, w, a, b in compared() if (n, t, w) == (name, tokens, way)]
                share = (made - real) / (weights(shape) + real)
                cells.append(f"{signed((made - real) / 2**20, 0)} ({signed(100 * share, 1)} %)")
        rows.append(cells)
    head = ["way", *(f"{name}, {r} x {n}" for name in SMALL for r, n in TOKENS)]
    return table(head, rows)


def worst() -> dict[str, float]:
    """The largest error of each way, as a share of the weights and what comes beside."""
    found: dict[str, float] = {}
    for name, _, way, real, made in compared():
        found[way] = max(found.get(way, 0.0), abs(made - real) / (weights(SMALL[name]) + real))
    return found


def computed() -> str:
    """GB in all, of the larger models."""
    rows, length = TOKENS[0]
    lines = [
        [LABELS[way], *(_size(weights(shape, ITEM) + formula(shape, rows, length, ITEM)) for shape in LARGE.values())]
        for way, formula in formulas.COMPUTED.items()
    ]
    head = ["way", *(f"{name} ({shape.parameters / 1e9:.2f})" for name, shape in LARGE.items())]
    return table(head, lines)


def beside() -> str:
    """GB beside the weights."""
    rows, length = TOKENS[0]
    lines = [
        [LABELS[way], *(_size(formula(shape, rows, length, ITEM)) for shape in LARGE.values())]
        for way, formula in formulas.COMPUTED.items()
    ]
    return table(["way", *LARGE], lines)


def _size(count: float) -> str:
    """GB with two digits that count."""
    value = count / 1e9
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def said() -> str:
    """What the tables come to."""
    rows, length = TOKENS[0]
    large = LARGE["13B"]
    in_place = weights(large, ITEM) + formulas.in_place(large, rows, length, ITEM)
    mixed = weights(large, ITEM) + formulas.adam_mixed(large, rows, length, ITEM)
    of = {way: stored()["results"][key(LARGEST, rows, length, way)]["extra"] / 2**20 for way in formulas.MEASURED}
    far = worst()
    return (
        f"At {LARGEST} parameters and {rows} x {length} tokens, MeZO in place takes {of['inplace']:,.0f} MiB beside the "
        f"weights, and inference {of['inference']:,.0f}; LoRA with Adam {of['LoRA, Adam']:,.0f}, Adam {of['Adam']:,.0f}. "
        f"By the formulas, a 13B model is tuned in place in {in_place / 1e9:.0f} GB, where Adam in mixed precision takes "
        f"{mixed / 1e9:.0f}: {mixed / in_place:.1f} times as much. The formulas' largest errors, of weights and what comes "
        f"beside: {', '.join(f'{way} {100 * share:.1f} %' for way, share in far.items())}."
    )


def draw() -> None:
    """GB in all, on a logarithmic scale."""
    rows, length = TOKENS[0]
    figure, (axes,) = panels(1, 10, 4.6)
    width = 0.8 / len(formulas.COMPUTED)
    for i, (way, formula) in enumerate(formulas.COMPUTED.items()):
        sizes = [(weights(shape, ITEM) + formula(shape, rows, length, ITEM)) / 1e9 for shape in LARGE.values()]
        places = [place + (i - len(formulas.COMPUTED) / 2 + 0.5) * width for place in range(len(LARGE))]
        axes.bar(places, sizes, width, color=COLOURS[way], label=LABELS[way].replace("`", ""))
    axes.set_yscale("log")
    for size, name in ((24, "24 GB"), (80, "80 GB")):
        axes.axhline(size, color="#999999", linewidth=0.8, linestyle=":")
        axes.text(-0.5, size, name, fontsize=8, va="bottom", color="#666666")
    axes.set_xticks(range(len(LARGE)), list(LARGE))
    axes.set_ylabel(f"GB in all, bfloat16, {rows} x {length} tokens")
    plain(axes)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, "memory", metadata={"Software": None})


PAGES = {
    "docs/memory.md": {"said": said, "measured": measured, "errors": errors, "computed": computed, "beside": beside}
}
