"""What a method remembers of earlier steps, in device memory: captured steps read and write it at places that stay."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from zokern.optim.ledger import Ledger
from zokern.passes.update import Seed, sent


class OnDevice:
    """The last `horizon` steps, newest first: seeds int64 [horizon], c float64 [horizon, groups]; zeros where a run has had
    fewer steps. rows: of c.

    entries: what there is to begin with, (seed, dropped blocks, c [groups]) each.
    """

    def __init__(
        self, entries: Iterable[tuple[int, list[int], Tensor]], horizon: int, groups: int, device: torch.device
    ) -> None:
        self.seeds = torch.zeros(horizon, dtype=torch.int64, device=device)
        self.c = torch.zeros(horizon, groups, dtype=torch.float64, device=device)
        self.rows = self.c.unbind()
        for i, (seed, _, c) in enumerate(entries):
            self.seeds[i].fill_(seed)
            self.rows[i].copy_(c, non_blocking=True)

    def shift(self, seed: Seed, c: Tensor, gate: Tensor | None, ledger: Ledger) -> None:
        """A step becomes the newest. gate: of a captured step; where it is 0 nothing changes."""
        for kept, first in ((self.seeds, seed), (self.c, c)):
            enter(kept, torch.cat([one_of(first, kept)[None], kept[:-1]]), gate, ledger)

    def tensors(self) -> list[Tensor]:
        return [self.seeds, self.c]


def one_of(value: Seed, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """On the device of `like`, without waiting: a number is filled in, as its dtype or another."""
    if isinstance(value, Tensor):
        return sent(value, like.device)
    return torch.full((), value, dtype=dtype or like.dtype, device=like.device)


def enter(kept: Tensor, value: Tensor, gate: Tensor | None, ledger: Ledger) -> None:
    """Writes to what a captured step reads, where it lies. A captured step is not taken back: where its gate is open, it is
    launched as a whole."""
    if gate is not None:
        kept.copy_(torch.where(gate.reshape(()).to(torch.bool), value, kept))
        return
    before = kept.clone()
    ledger.undo(lambda: kept.copy_(before))
    kept.copy_(value)
