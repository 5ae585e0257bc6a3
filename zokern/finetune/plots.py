"""The curves of a run as one PNG: loss and held-out accuracy over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zokern import drawing
from zokern.finetune.options import REMEDY, FinetuneError
from zokern.finetune.records import score
from zokern.tasks.metrics import METRICS

_LOSS, _ACCURACY, _INK = "#3b6ea5", "#c2571a", "#444444"


def require() -> None:
    """Raise FinetuneError now, rather than after the training, where matplotlib is missing."""
    try:
        drawing.load()
    except ImportError:
        raise FinetuneError(f"curves.png needs matplotlib, which is not installed; {REMEDY}") from None


def smooth(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """Exponential mean, corrected for its start. Values that are not finite leave it as it was."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        if value - value == 0.0:
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        out.append(mean / weight if weight else float("nan"))
    return out


def save(path: Path, records: Sequence[dict[str, Any]], title: str) -> None:
    """Draw the records of metrics.jsonl into `path`."""
    figure = drawing.figure(figsize=(10, 4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    train = [(r["step"], r["loss"]) for r in records if r["kind"] == "train" and r["loss"] is not None]
    held = [
        (r["step"], float("nan") if r["loss"] is None else r["loss"], score(r)) for r in records if r["kind"] == "eval"
    ]
    metric = next((r["metric"] for r in records if "metric" in r), "accuracy")
    known = metric in METRICS
    digits, unit = ("1f", " %") if known else ("4g", "")
    if train:
        steps, losses = zip(*train, strict=True)
        left.plot(steps, losses, color=_LOSS, alpha=0.25, linewidth=1)
        left.plot(steps, smooth(losses), color=_LOSS, linewidth=2, label="training batches, smoothed")
    if held:
        steps, losses, shares = zip(*held, strict=True)
        left.plot(steps, losses, color=_ACCURACY, marker="o", markersize=4, linewidth=1.5, label="held out")
        percents = [100 * share for share in shares] if known else list(shares)
        right.plot(steps, percents, color=_ACCURACY, marker="o", markersize=4, linewidth=2)
        right.axhline(percents[0], color=_INK, linewidth=1, linestyle=":")
        right.annotate("before", (1, percents[0]), xycoords=("axes fraction", "data"), xytext=(-4, 4),
                       textcoords="offset points", ha="right", color=_INK, fontsize=9)  # fmt: skip
        at = (steps[-1], percents[-1])
        gained = f"{percents[-1]:.{digits}}{unit}  ({percents[-1] - percents[0]:+.{digits}})"
        right.annotate(gained, at, xytext=(0, -20), ha="right", textcoords="offset points", color=_ACCURACY,
                       fontsize=10, weight="bold")  # fmt: skip
    left.set_title("Loss", loc="left", fontsize=11)
    right.set_title(f"Held-out {metric.replace('_', ' ')}{', %' if known else ''}", loc="left", fontsize=11)
    left.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.margins(y=0.15)
        axes.set_xlabel("step")
        axes.grid(axis="y", color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK)
    drawing.plain(figure.suptitle("", x=0.01, ha="left", fontsize=12), title)
    figure.savefig(path)
