"""How lr of a method is chosen: a grid of half-decades, which grows where the best lies at its edge."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
