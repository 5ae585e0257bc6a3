"""What a check has found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zokern.checking.cost import Cost

REACTS, NO_EFFECT = "reacts", "no effect seen"
NOT_TRAINED, NOT_LOOKED_AT = "not trained", "not looked at"


@dataclass(frozen=True)
class Row:
    """One tensor.

    names: all that a tied one has. state: "reacts", "no effect seen", "not trained" or "not looked at". size: standard
    deviation of the smallest perturbation that changed the loss, or of the largest that was tried. change: of the loss by
    it. moved: share of the elements that eps z changes in the tensor's dtype; None where nothing was tried. suspicious:
    likely a fault. why: the reasons, the likeliest first.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    state: str
    size: float | None = None
    change: float | None = None
    moved: float | None = None
    suspicious: bool = False
    why: str = ""

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Finding:
    """Something said of the whole. subject: "loss", "same function", "eps", "tensors", "training", "placement",
    "time" or "buffers"."""

    subject: str
    text: str
    suspicious: bool = False


@dataclass(frozen=True, repr=False)
class Result:
    """What `zokern.check` returns; `str()` of it is the table, which a notebook or a prompt shows, and rich prints it too.

    rows: every trainable tensor in the model's order, then what is not trained. verdicts: of the whole. loss: of the clean
    weights, its mean where the closure returns one for each example. same_twice: whether the closure, called twice as a
    step calls it, returned the same bits. noise: spread of the losses of equal weights and random state, 0.0 where they
    agree to the bit. looked_at: trainable tensors that were perturbed, of `trainable`. forwards: calls of the closure, a
    batch each, that the check took. cost: of one step.
    """

    rows: Sequence[Row]
    verdicts: Sequence[Finding]
    loss: float
    same_twice: bool
    noise: float
    placement: str
    eps: float
    looked_at: int
    trainable: int
    forwards: int
    seconds: float
    cost: Cost

    @property
    def ok(self) -> bool:
        """Nothing suspicious was seen, among the tensors that were looked at."""
        return not any(row.suspicious for row in self.rows) and not any(one.suspicious for one in self.verdicts)

    @property
    def without_effect(self) -> list[Row]:
        """Tensors that the loss did not react to."""
        return [row for row in self.rows if row.state == NO_EFFECT]

    @property
    def not_trained(self) -> list[Row]:
        return [row for row in self.rows if row.state == NOT_TRAINED]

    @property
    def moved(self) -> dict[torch.dtype, float]:
        """For each dtype the share of elements that eps z changes, over the tensors that were looked at."""
        changed: dict[torch.dtype, float] = {}
        total: dict[torch.dtype, int] = {}
        for row in self.rows:
            if row.moved is not None:
                size = math.prod(row.shape)
                changed[row.dtype] = changed.get(row.dtype, 0.0) + row.moved * size
                total[row.dtype] = total.get(row.dtype, 0) + size
        return {dtype: changed[dtype] / total[dtype] for dtype in total}

    def __str__(self) -> str:
        from zokern.checking.table import as_text  # rich is loaded by whoever looks

        return as_text(self)

    __repr__ = __str__  # of forty rows' fields nobody sees anything

    def __rich__(self) -> object:
        from zokern.checking.table import rendered

        return rendered(self)
