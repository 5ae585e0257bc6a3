"""The lr to begin with, by rule of thumb (docs/choose.md)."""

from __future__ import annotations

from zokern.optim.base import ZerothOrderOptimizer
from zokern.optim.mezo import MeZO

FAR = 3.0  # times more or less: the next lr of a usual search
LARGEST = 4e8  # parameters; the searches went to 135 million


def mezo(trained: int, directions: int) -> float:
    """0.04 n / P^0.4, from the stored searches on models of 0.2 to 135 million parameters. trained: P; directions: n."""
    return 0.04 * directions / float(trained**0.4)


def ruled(optimizer: ZerothOrderOptimizer, lr: float, trained: int, every_weight: bool) -> float | None:
    """The rule's lr, where lr is far from it. It is for MeZO alone, on all weights, moved by plain updates."""
    if type(optimizer) is not MeZO or not every_weight or not 0 < trained <= LARGEST or not lr:
        return None
    if (optimizer.options.get("update") or "sgd") != "sgd":
        return None
    found = mezo(trained, optimizer.options["num_samples"])
    return None if 1 / FAR < lr / found < FAR else found


def note(optimizer: ZerothOrderOptimizer, lr: float, trained: int, every_weight: bool) -> str | None:
    """What is said of an lr that is far from the rule's."""
    found = ruled(optimizer, lr, trained, every_weight)
    if found is None:
        return None
    return (
        f"lr {lr:g} is {lr / found:.2g} times what the rule says for so many parameters, {found:.2g} (docs/choose.md)"
    )
