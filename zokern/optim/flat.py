"""Counts steps that say nothing: all losses finite and equal to the last bit, so every coefficient is zero.

One such step is chance; five in a row are a loss that does not see the perturbation. The counts live on the device of the
losses, as skipped steps do, and the host looks at them in a later step, without waiting.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zokern.optim.arriving import Arriving
from zokern.optim.ledger import Ledger
from zokern.passes.update import CPU, sent

IN_A_ROW = 5  # steps, after which it is told
COUNT, STREAK, LONGEST, WHOLE = range(
    4
)  # of flat steps; now, and at most, in a row; with losses that are whole numbers


class Flats:
    """numbers: the four counts on the host, until losses come from a device; from then on `there`, int64 [4]."""

    def __init__(self, count: int = 0) -> None:
        self.numbers = [count, 0, 0, 0]
        self.there: Tensor | None = None
        self._seen: Arriving | None = None  # the counts

    @property
    def count(self) -> int:
        """Waits for the device."""
        return self.now()[COUNT]

    def now(self) -> list[int]:
        """The counts. Waits for the device."""
        return self.numbers if self.there is None else self.there.tolist()

    def on(self, device: torch.device) -> Tensor:
        """The counts as a tensor there, which stays at its place."""
        if self.there is None:
            self.there = torch.tensor(self.numbers, dtype=torch.int64, device=CPU)
        self.there = sent(self.there, device)
        return self.there

    def note(self, losses: Tensor, values: list[float] | None, gate: Tensor | None, ledger: Ledger) -> None:
        """The losses of a step that is about to be made, float64 [P]; and on the host, if they are there. gate: of a
        captured step, a zero counts nothing."""
        if len(losses) < 2:  # one number is no comparison
            return
        if values is not None and gate is None and self.there is None:
            first, before = values[0], self.numbers
            ledger.undo(lambda: setattr(self, "numbers", before))
            count, streak, longest, whole = before
            if values.count(first) == len(values) and math.isfinite(first):
                streak += 1
                self.numbers = [count + 1, streak, max(streak, longest), whole + first.is_integer()]
            else:
                self.numbers = [count, 0, longest, whole]
            return
        there = self.on(losses.device)
        if gate is None:
            kept = there.clone()
            ledger.undo(lambda: there.copy_(kept))
        flat = (losses == losses[0]).all() & torch.isfinite(losses[0])
        counted = torch.ones_like(flat) if gate is None else gate.reshape(()).to(torch.bool)
        number, row, most, integers = there.unbind()
        number.add_(flat & counted)
        integers.add_(flat & counted & (losses[0] == losses[0].round()))
        row.copy_(torch.where(counted, (row + 1) * flat, row))  # in place, for a step captured in a graph
        most.copy_(torch.maximum(most, row))

    def look(self) -> None:
        """Starts a copy of the counts to the host."""
        if self.there is not None and self.there.device.type != "cpu" and self._seen is None:
            self._seen = Arriving(self.there)

    def known(self) -> list[int] | None:
        """The counts as far as the host knows them without waiting; None where it does not."""
        if self.there is None or self.there.device.type == "cpu":
            return self.now()
        self.look()
        numbers: list[int] | None = None if self._seen is None else self._seen.values()
        if numbers is not None:
            self._seen = None
        return numbers
