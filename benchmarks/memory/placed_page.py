"""docs/memory.md's part on the placements, from results/memory-placed-cpu.json: what each takes, measured and said."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

from benchmarks.memory.models import MODELS, NUMBERS
from benchmarks.memory.page import ITEM
from benchmarks.memory.placed import INFERENCE, WAYS
from benchmarks.memory.run import TOKENS, key
from benchmarks.parts import load, made_on, panels, plain, save, short_gpu, signed, table
from zokern.bench.plots import BLUE, GREEN, INK, ORANGE, PINK, RED, SKY

MIB = 2**20
SHORT, LONG = TOKENS
COLOURS = dict(zip(WAYS, (INK, GREEN, BLUE, PINK, SKY, ORANGE, RED), strict=True))
LABELS = {way: f"`{way}`" for way in WAYS} | {
    "stream, prefetch": "`stream`, `prefetch=True`",
    "forward, rank 1": "`forward`, rank 1",
    "forward, rank 1, fold_every=4": "`forward`, rank 1, `fold_every=4`",
    "HiZOO, stream": "`stream`, with HiZOO's curvature",
}
COPIES = [way for way in WAYS if not way.startswith("forward")]
THIN, FOLDS = ["forward, rank 1"], ["forward, rank 1, fold_every=4"]
GPU = "h200/step-cuda-opt-1.3b.json"
GPU_CASES = {
    "inplace": "mezo inplace", "stream": "mezo stream", "stream, prefetch": "mezo stream-prefetch",
    "HiZOO, stream": "hizoo stream",
}  # fmt: skip


@functools.cache
def stored() -> dict[str, Any]:
    return load("memory-placed-cpu.json")


def weights(model: str) -> int:
    """Bytes."""
    return NUMBERS[model] * ITEM


def found(model: str, tokens: tuple[int, int], way: str) -> tuple[int, int]:
    """Bytes over inference, as said and as measured."""
    of = stored()["results"]
    one, without = of[key(model, *tokens, way)], of[key(model, *tokens, INFERENCE)]
    return one["said"], one["extra"] - without["extra"]


def placed() -> str:
    lines = [
        [LABELS[way], *(" / ".join(f"{count / MIB:,.1f}" for count in found(model, LONG, way)) for model in MODELS)]
        for way in WAYS
    ]
    head = ["way", *(f"{model} ({weights(model) / MIB:,.0f})" for model in MODELS)]
    rows, length = LONG
    what = f"MiB over inference, said / measured, with {rows} x {length} tokens; in brackets the weights"
    note = f"{made_on(stored())}; {what}."
    return f"{note}\n\n{table(head, lines)}"


def far() -> str:
    """How far the numbers are apart."""
    most = max(abs(gap) * MIB / weights(model) for model, gap in _gaps(COPIES))
    return (
        f"With {' and '.join(f'{rows} x {length}' for rows, length in TOKENS)} tokens, what was measured is "
        f"{_range(COPIES)} MiB from what is said, at most {100 * most:.1f} % of the weights; for `forward` "
        f"{_range(THIN)}, and {_range(FOLDS)} where updates wait."
    )


def gpu() -> str:
    """The same on a GPU, of the shape that both have measured: a step's peak over a forward, as its allocator counts."""
    run, model, (rows, length) = load(GPU), "OPT-1.3B", (16, 256)
    told = []
    for way, case in GPU_CASES.items():
        said, _ = found(model, LONG, way)
        held = run["results"][f"opt-1.3b {rows}x{length} {case}"]["extra_bytes"]
        told.append(f"{LABELS[way]} {said / MIB:,.1f} / {held / MIB:,.1f}")
    return (
        f"On an {short_gpu(run)} the allocator's peak over a forward, for {model} with {rows} x {length} tokens, said / "
        f"measured: {', '.join(told)} (commit {run['commit'][:7]})."
    )


def _gaps(ways: Collection[str]) -> list[tuple[str, float]]:
    """Measured minus said, in MiB, beside the model: of these ways."""
    return [
        (model, (measured - said) / MIB)
        for model in MODELS for tokens in TOKENS for said, measured in (found(model, tokens, way) for way in ways)
    ]  # fmt: skip


def _range(ways: Collection[str]) -> str:
    gaps = [gap for _, gap in _gaps(ways)]
    return f"{signed(min(gaps), 1)} to {signed(max(gaps), 1)}"


def draw() -> None:
    """Shares of the weights: bars as measured, lines across them as said."""
    figure, (axes,) = panels(1, 10, 4.2)
    width = 0.8 / len(WAYS)
    for i, way in enumerate(WAYS):
        places = [place + (i - len(WAYS) / 2 + 0.5) * width for place in range(len(MODELS))]
        shares = [[100 * count / weights(model) for count in found(model, LONG, way)] for model in MODELS]
        label = LABELS[way].replace("`", "")
        axes.bar(places, [measured for _, measured in shares], width, color=COLOURS[way], label=label)
        axes.hlines(
            [said for said, _ in shares], [x - width / 2 for x in places], [x + width / 2 for x in places],
            color="#000000", linewidth=1.2, label="as said" if way == list(WAYS)[-1] else None,
        )  # fmt: skip
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks([0, 1, 10, 100], ["0", "1 %", "10 %", "100 %"])
    axes.set_xticks(range(len(MODELS)), [f"{model}\n{weights(model) / MIB:,.0f} MiB" for model in MODELS])
    axes.set_ylabel("memory over inference,\nshare of the weights")
    plain(axes)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, "memory_placed", metadata={"Software": None})


PAGES = {"docs/memory.md": {"placed": placed, "far": far, "gpu": gpu}}
