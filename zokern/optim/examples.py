"""Losses of each example, of one probe or of many that share a forward.

In a forward with N blocks of B rows, L_k of a micro-batch is the mean over the block's rows kB to (k+1)B - 1 of what the
closure returns, or their sum with reduction="sum"; micro-batches are then put together as those of one loss each.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zokern import _checks
from zokern.optim import repeating
from zokern.optim.losses import HALVES, Losses
from zokern.passes.update import CPU
from zokern.placement.rows import Rows
from zokern.sweep import Counters


def most_of(batched: object) -> int | None:
    """The argument as the most probes that a forward takes; None for no limit, 0 where it is not asked for.

    Raises:
        TypeError, ValueError: for what is neither a bool nor a number above 0.
    """
    if isinstance(batched, bool):
        return None if batched else 0
    if not isinstance(batched, numbers.Integral):
        raise TypeError(
            "batched must be True, False or a number, the most probes that one forward may take; got "
            f"{type(batched).__name__}"
        )
    return _checks.check_integer(batched, "batched", 1)


def losses_of(batched: object, *args: Any, **named: Any) -> Losses:
    """Those of a step, for its argument `batched`."""
    most = most_of(batched)
    return Losses(*args, **named) if most == 0 else PerExample(*args, most=most, **named)


class PerExample(Losses):
    """Of a step in which batched is given. sizes: the rows of each micro-batch. most: probes that a forward may take, None
    for any number. largest: how many one took. rows: of the forward under way."""

    def __init__(self, *args: Any, most: int | None = None, **named: Any) -> None:
        super().__init__(*args, **named)
        self.most, self.largest, self.rows = most, 1, Rows(1)
        if self.batches is None:
            raise ValueError(
                "batched repeats the tensors of batches for each direction, and batches are not given: give them, and a "
                "closure that takes one of them and returns the loss of each example"
            )
        self.sizes = [repeating.size_of(batch, f"batches[{i}]") for i, batch in enumerate(self.batches)]

    def evaluate(self, counters: Counters, device: torch.device | None = None) -> Tensor:
        return self.of_blocks(counters, device, Rows(1))[0]

    def of_blocks(self, counters: Counters, device: torch.device | None, rows: Rows) -> list[Tensor]:
        """The loss of each block, 0-d."""
        self.rows = rows
        return list(super().evaluate(counters, device).unbind())

    def _arguments(self) -> Iterator[tuple[Any, ...]]:
        assert self.batches is not None
        for batch, size in zip(self.batches, self.sizes, strict=True):
            self.rows.batch = size
            yield (repeating.repeated(batch, size, self.rows.count),)

    def metrics(self) -> dict[str, Tensor]:
        """Also "probes_per_forward", the most that shared one: 1 where they were evaluated one after another."""
        largest = torch.full((), self.largest, dtype=torch.float32, device=self.each[0].device)
        return {**super().metrics(), "probes_per_forward": largest}

    def _number(self, returned: Any, device: torch.device | None, name: str | None = None) -> Tensor:
        """The loss of each block of a micro-batch, float64 [N]."""
        rows = self.rows
        which, wanted = "the loss" if name is None else f"the loss {name!r}", rows.count * rows.batch
        if isinstance(returned, Sequence | np.ndarray) and not isinstance(returned, str):
            numbers = [x.item() if isinstance(x, Tensor | np.ndarray | np.generic) else x for x in returned]
            returned = torch.tensor(numbers, dtype=torch.float64, device=CPU)
        if not isinstance(returned, Tensor) or returned.dim() != 1 or returned.shape[0] != wanted:
            got = (
                f"a tensor of shape {tuple(returned.shape)}"
                if isinstance(returned, Tensor)
                else type(returned).__name__
            )
            raise TypeError(
                f"with batched, closure must return {which} of each example, a tensor of shape ({wanted},) for a batch of "
                f"{rows.batch} rows repeated {rows.count} times; got {got}. Leave out the mean over the batch "
                "(reduction='none'), or leave out batched"
            )
        if self.loss_weights and name is None:
            raise self.unnamed()
        if returned.dtype.is_complex or returned.layout is not torch.strided:
            raise TypeError(f"closure must return {which} as real numbers in a dense tensor")
        if returned.dtype in HALVES:
            self.half = returned.dtype
        if returned.grad_fn is not None:
            self.graph = True
        each = returned.detach().to(torch.float64).view(rows.count, rows.batch)
        return each.mean(dim=1) if self.reduction == "mean" else each.sum(dim=1)

    def _together(self, losses: list[Tensor]) -> Tensor:
        return self._mean(losses)

    def _note(self, by_name: list[dict[str, Tensor]], count: int) -> None:
        before = {name: len(each) for name, each in self.named.items()}
        super()._note(by_name, count)
        for name, each in self.named.items():
            # One number for all blocks: as often as there are, for the mean over probes.
            if len(each) > before.get(name, 0):
                each.extend([each[-1]] * (self.rows.count - 1))
