"""How lr of a method is chosen: a grid of half-decades, which grows where the best lies at its edge; and where a run says
that it was too large for its length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

MAX_GROWN = 2  # lr beyond the edges of a grid


def half_decade(lr: float, up: bool) -> float:
    """The next one of ..., 1e-5, 3e-5, 1e-4, ..."""
    digit, exponent = f"{lr:.0e}".split("e")
    if up:
        return float(f"3e{exponent}") if digit == "1" else float(f"1e{int(exponent) + 1}")
    return float(f"1e{exponent}") if digit == "3" else float(f"3e{int(exponent) - 1}")


def best(grid: list[dict[str, Any]]) -> float:
    """The lr with the lowest validation loss; the lowest lr where all have diverged."""
    return float(min((math.inf if point["loss"] is None else point["loss"], point["lr"]) for point in grid)[1])


def next_lr(start: Sequence[float], grid: list[dict[str, Any]]) -> float | None:
    """What a search tries next; None: it is done. start: the lr that it begins with. grid: what has been tried."""
    tried = [point["lr"] for point in grid]
    for lr in start:
        if lr not in tried:
            return lr
    found = best(grid)
    if len(tried) - len(start) >= MAX_GROWN or min(tried) < found < max(tried):
        return None
    return half_decade(found, up=found == max(tried))


def lower(grid: list[dict[str, Any]], lr: float) -> float:
    """The next lower lr: of those that were tried, else by half a decade."""
    return max((point["lr"] for point in grid if point["lr"] < lr), default=half_decade(lr, up=False))


def falls_back(runs: list[dict[str, Any]]) -> bool:
    """Whether the mean loss of all seeds is higher at the end of their curves than at the first look, or none."""

    def loss(look: int) -> float:
        losses = [run["curve"][look]["loss"] for run in runs]
        return math.inf if None in losses else mean(losses)

    return loss(-1) > loss(0) or math.isinf(loss(-1))


def wants_lower(record: dict[str, Any], seeds: int) -> bool:
    """Whether a method has to run with a lower lr as well, once: all seeds are there, and their lr is too large."""
    return len(record["runs"]) == seeds and falls_back(record["runs"]) and not record.get("lower")
