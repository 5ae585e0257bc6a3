"""Which optimizers have updates that can wait."""

from __future__ import annotations

from typing import Any

from zokern.placement.pending import ForwardPending


def refuse_folding(owner: Any, placement: object) -> ForwardPending:
    """The placement, where updates can wait.

    Raises:
        ValueError: naming what keeps them from it, with the remedy.
    """
    given = f"fold_every is {owner.fold_every}"
    if not isinstance(placement, ForwardPending):
        raise ValueError(
            f"{given}, and placement={getattr(placement, 'name', placement)!r} shows no updates that wait: give "
            "placement='forward' (by its name), or fold_every=1"
        )
    if owner.layers is not None:
        raise ValueError(f"{given}, and layers moves other blocks in each step: leave layers out, or give fold_every=1")
    if not owner.plain_updates():
        raise ValueError(
            f"{given}, and an update of {type(owner).__name__} as it is set needs the weights' states or sums, so that it "
            "cannot wait: give fold_every=1, or a method or rule without states (update='sgd')"
        )
    return placement
