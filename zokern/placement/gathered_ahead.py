"""prefetch=True of placement="stream" for a module of FSDP2: what runs next is gathered and perturbed on a side stream.

FSDP2's own streams gather the next block's weights beside a block, but copy them out, which has to come before they can be
perturbed, on the compute stream when that block is called. So all three are done ahead here, by FSDP2's public `unshard()`,
which works on the stream that is current. Until the block is called its places hold what refuses to be computed with, as
always while it does not run. Ranks foresee the same, as they run the same modules, so they gather in the same order.

FSDP2 allocates here on the side stream, where the memory goes back when it reshards, and the next use waits for the compute
stream's work until then. Weights resharded to a smaller mesh (reshard_after_forward=<int>) are gathered when their block is
called: they lie in the compute stream's memory, which FSDP2 frees once they are copied out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from zokern.passes.update import Terms
from zokern.placement import fsdp, sites
from zokern.placement.beside import Beside, Done
from zokern.placement.gathered import Gathered, Unit
from zokern.placement.order import Order
from zokern.sweep import Sweep


class GatheredAhead(Gathered):
    """filled: units that are perturbed ahead, with what they wait for. wholes: what they have gathered, for each place."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = Beside()
        self.order: Order[Unit] = Order()
        self.rounds = 0  # how often the last forward went through all as the module lists them
        self.filled: dict[Unit, Done] = {}
        self.wholes: dict[Unit, list[tuple[sites.Site, nn.Parameter]]] = {}

    def _arrange(self, sweep: Sweep) -> None:
        super()._arrange(sweep)
        self.order = Order(self.units * self.rounds)

    @contextlib.contextmanager
    def present(self, terms: Terms) -> Iterator[None]:
        try:
            with super().present(terms):
                self.order.begin()
                yield
                if terms:
                    self.order.learn()
                    self.rounds = self.order.rounds(self.units)
        except BaseException:
            self.beside.give_up()
            raise
        finally:
            self.filled, self.wholes = {}, {}
            self.beside.join()

    def end(self) -> None:
        self.beside.join()  # where the one of a probe has failed
        super().end()

    def _before(self, unit: Unit) -> None:
        if not self.terms:
            return
        done = self.filled.pop(unit, None)
        if done is not None:
            self.beside.wait(done)
            wholes = self.wholes.pop(unit)
            if all(group.is_unsharded for group in _groups(unit)):  # not where a state_dict() has resharded it since
                for site, whole in wholes:
                    site.show(whole)
        super()._before(unit)

    def _gathered(self, unit: Unit) -> None:
        if not self.terms:
            return
        super()._gathered(unit)
        self.order.call(unit)
        coming = self.order.next
        if coming is not None and coming not in self.filled and coming.is_sharded():  # and not to a smaller mesh
            devices = dict.fromkeys(group.device for group in _groups(coming))
            self.filled[coming] = self.beside.do(devices, functools.partial(self._gather, coming, self.terms))

    @torch.no_grad()
    def _gather(self, unit: Unit, terms: Terms) -> None:
        one = unit.modules[0]
        try:
            one.unshard()
            self._write(unit, terms)
            self.wholes[unit] = [(site, getattr(site.owner, site.name)) for site, _ in unit.places]
            for site, outside in unit.places:
                site.show(outside)
            unit.fresh = False
        except BaseException:
            one.reshard()
            unit.fresh = True
            raise


def _groups(unit: Unit) -> list[Any]:
    return fsdp.groups_of(unit.modules[0]._get_fsdp_state())
