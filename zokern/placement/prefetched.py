"""prefetch=True of placement="stream": the next block's scratch is filled on a side stream while the block before runs.

Blocks take two scratches in turn, by the order of their calls. When a block is called, the compute stream waits for its
scratch; then the side stream, behind all that the compute stream was given so far, fills the other one, which the block
before has left, with the block that came next in the last forward. One that was not foreseen is filled when it is called.

All fills are on the side stream, so what lies in a scratch is what was asked for last. Each waits for what the compute
stream was given: the block that had the scratch, and the update of the step before. Every probe ends by a join, so no fill
is in flight when weights are written or memory changes hands, whatever was raised. So nothing of the caching allocator
needs record_stream: what the compute stream has allocated and the side stream uses (the scratches; the numbers of a probe,
which `latest` holds) is freed after a join, and what the side stream has allocated goes back to that stream.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from zokern.passes.update import Terms
from zokern.placement.beside import Beside
from zokern.placement.order import Order
from zokern.placement.stream import Stream
from zokern.placement.units import Unit
from zokern.sweep import Sweep


class Prefetched(Stream):
    def __init__(self) -> None:
        super().__init__(scratches=2)
        self.beside = Beside()
        self.order: Order[Unit] = Order()
        self.rounds = 0  # how often the last forward went through the blocks as the module lists them

    def _lay_out(self, members: Sweep) -> list[Unit]:
        before = self.kept
        units = super()._lay_out(members)
        if units is not before:  # LeZO's, in each step
            self.order = Order(units[1:] * self.rounds)
        return units

    @contextlib.contextmanager
    def present(self, terms: Terms) -> Iterator[None]:
        try:
            with super().present(terms):
                if terms:
                    self.order.begin()
                    self._fill_next()
                yield
                if terms:
                    self.order.learn()
                    self.rounds = self.order.rounds(self.kept[1:])
        except BaseException:
            self.beside.give_up()
            raise
        finally:
            self.beside.join()

    def end(self) -> None:
        self.beside.join()  # where the one of a probe has failed
        super().end()

    def _written(self, unit: Unit) -> int:
        number = len(self.order.called) % 2
        scratch = self.scratches[number]
        if not (scratch.ahead and scratch.last is unit):
            self._fill(unit, number)
        scratch.ahead = False
        self.beside.wait(scratch.done)
        self.order.call(unit)
        self._fill_next()
        return number

    def _fill_next(self) -> None:
        unit = self.order.next
        if unit is not None:
            number = len(self.order.called) % 2
            self._fill(unit, number)
            self.scratches[number].ahead = True

    def _fill(self, unit: Unit, number: int) -> None:
        self._take(unit, number)
        work = functools.partial(self._write, unit, number, self.terms)
        self.scratches[number].done = self.beside.do(unit.devices, work)
