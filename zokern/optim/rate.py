"""The lr to begin with, by rule of thumb (docs/choose.md)."""

from __future__ import annotations

from typing import NamedTuple

from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.mezo import MeZO

FAR = 3.0  # times more or less: the next lr of a usual search
LARGEST = 4e8  # parameters; the searches went to 135 million


def mezo(trained: int, directions: int) -> float:
    """0.04 n / P^0.4, from the stored searches on models of 0.2 to 135 million parameters. trained: P; directions: n."""
    return 0.04 * directions / float(trained**0.4)


class Far(NamedTuple):
    """An lr that is far from the rule's."""

    lr: float
    ruled: float
    trained: int

    def said(self) -> str:
        lr, ruled, trained = self
        far, may = (
            (f"{_plain(lr / ruled)} times", "lose what the model has learnt")
            if lr > ruled
            else (f"{_plain(ruled / lr)} times smaller than", "learn nothing in its steps")
        )
        many = f"{_plain(trained / 1e6, 3)} million" if trained >= 1e6 else _plain(trained, 3)
        return (
            f"lr {lr:g} is {far} {ruled:.2g}, which the rule of thumb has for {many} parameters: the run may {may}; "
            "docs/choose.md#which-lr"
        )


def far(optimizer: ZerothOrderOptimizer, lr: float, trained: int, every_weight: bool) -> Far | None:
    """None where lr is near the rule's. The rule is for MeZO alone, on all weights, moved by plain updates."""
    if type(optimizer) is not MeZO or not every_weight or not 0 < trained <= LARGEST or not lr:
        return None
    if (optimizer.options.get("update") or "sgd") != "sgd":
        return None
    ruled = mezo(trained, optimizer.options["num_samples"])
    return None if 1 / FAR < lr / ruled < FAR else Far(lr, ruled, trained)


def note(optimizer: ZerothOrderOptimizer, lr: float, trained: int, every_weight: bool) -> str | None:
    """What is said of an lr that is far from the rule's."""
    found = far(optimizer, lr, trained, every_weight)
    return None if found is None else found.said()


def _plain(number: float, digits: int = 2) -> str:
    """1234.5 -> '1,200'."""
    return f"{float(f'{number:.{digits}g}'):,.12g}"
