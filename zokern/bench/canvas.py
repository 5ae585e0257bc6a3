"""What the pictures share: matplotlib's figure, the colours, the machine's name below it, a file written whole.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REMEDY = 'pip install "zokern[bench]"'
INK = "#444444"
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7",
)  # fmt: skip
Record = Mapping[str, Any]


class PlotError(Exception):
    """What stands in the way of a picture, and the remedy."""


def require() -> None:
    """Raise PlotError where matplotlib is missing: now, rather than after a long run."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PlotError(f"the plots need matplotlib, which is not installed: {REMEDY}, or use --no-plot") from None


def caption(record: Record) -> str:
    """The machine of a run in one line."""
    machine = record["machine"]
    if "gpu" in machine:
        return f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, torch {machine['torch']}"
    sets = machine.get("instruction_sets") or ["no compiled module"]
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] != 1)
    return f"{machine['processor']}, {threads}, {sets[0]}, torch {machine['torch']}"


def figure_of(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: its global state belongs to the caller

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    axes.set_axisbelow(True)
    return figure, axes


def save(figure: Any, record: Record, path: Path) -> Path:
    head, _, changes = record["commit"].partition("+")
    text = f"{caption(record)}; {record['date'][:10]}, commit {head[:10]}{' with ' + changes if changes else ''}"
    if not record.get("complete", True):
        text += "; the run broke off"
    figure.supxlabel(text, fontsize=7.5, color=INK, x=0.01, ha="left")
    temporary = path.with_name(path.stem + ".tmp" + path.suffix)
    figure.savefig(temporary)
    os.replace(temporary, path)
    return path
