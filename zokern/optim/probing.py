"""Probes evaluated: the placement shows their weights, the closure runs, and interrupts come only while it does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import Tensor

from zokern.interrupts import HeldInterrupts
from zokern.optim import reach
from zokern.optim.examples import PerExample
from zokern.optim.losses import Losses
from zokern.passes.update import Terms
from zokern.placement.forward import Forward
from zokern.placement.rows import Rows

Result = TypeVar("Result")


class Probing:
    """Of one step of an optimizer, `owner`."""

    def __init__(self, owner: Any, losses: Losses, eps: Tensor, interrupts: HeldInterrupts) -> None:
        self.owner, self.losses, self.eps, self.interrupts = owner, losses, eps, interrupts
        self.counters, self.sweep = owner._passes.counters, owner.active.sweep

    def alone(self, probes: Sequence[Terms]) -> list[Tensor]:
        """The loss of each, one after another."""
        present, compute = self.owner._placement.present, self.losses.evaluate
        compute, losses = functools.partial(compute, self.counters, self.owner.numbers.device), []
        for terms in probes:
            if not reach.UNIT.issuperset(terms.values()):
                reach.check_probe(terms, self.eps, self.sweep.params)
            losses.append(self._run(present(terms), compute))
        return losses

    def together(self, probes: Sequence[Terms], rows: Rows) -> list[Tensor]:
        """Those of many, each in a block of the batch's rows. Needs placement="forward" and losses of each example."""
        for terms in probes:
            reach.check_probe(terms, self.eps, self.sweep.params)
        placement, losses, device = self.owner._placement, self.losses, self.owner.numbers.device
        assert isinstance(placement, Forward)
        assert isinstance(losses, PerExample)
        compute = functools.partial(losses.of_blocks, self.counters, device, rows)
        return self._run(placement.present_together(probes, rows), compute)

    def _run(self, presented: AbstractContextManager[None], compute: Callable[[], Result]) -> Result:
        owner, interrupts, sweep = self.owner, self.interrupts, self.sweep
        with presented:
            try:
                interrupts.release()
                return compute()
            finally:
                interrupts.holding = True
                interrupts.hold()
                if owner._guards.busy:
                    owner._guards.probed()
                addresses = list(map(Tensor.data_ptr, sweep.params))
                if addresses != sweep.addresses:  # the closure has moved weights: what was there may be freed
                    sweep.addresses = addresses
                    sweep.forget()
                    owner._parameters.look_again()
