"""What goes wrong silently is told: steps that train nothing, losses that do not react, closures that do other work.

A step asks its guards at four places: when it begins, after each probe, when its losses are known, and when it is over.
Warnings are raised when the step is over, so that one made an error leaves a whole step behind.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zokern import parts
from zokern import placement as placements
from zokern._checks import ZokernWarning
from zokern.optim import causes, frameworks, pairing, state
from zokern.optim.examples import PerExample
from zokern.optim.flat import COUNT, IN_A_ROW, LONGEST, STREAK, WHOLE, Flats
from zokern.optim.ledger import Ledger
from zokern.optim.losses import Losses
from zokern.optim.watching import Watch
from zokern.placement import fsdp


class Guards:
    """Of one optimizer, which is asked for each time and not held.

    wanted: the placement as it was given; `sixteen_bit`, whether any weight has 16 bits, is what "auto" went by.
    """

    def __init__(self, module: nn.Module | None, wanted: object, sixteen_bit: bool, *, all_of_it: bool) -> None:
        self.watch = None if module is None else Watch(module, all_of_it=all_of_it)
        self.flats = Flats()
        self.wanted, self.sixteen_bit = wanted, sixteen_bit
        self._active: weakref.ref[Any] | None = None  # for which the placement was looked at
        self._draws: pairing.Draws | None = None
        self._looking: pairing.Looking | None = None  # in the first probe of all
        self._grads: tuple[Tensor | None, Tensor | None] = None, None  # of the first and the last, before the forwards
        self.busy = False  # there is something to do after a forward
        self.due = False  # there may be something to tell
        self._pending: dict[str, str] = {}  # warnings for when the step is over, by subject
        self._told: set[str] = set()
        self._half: torch.dtype | None = None  # of the losses, where one had 16 bits
        self._first = True  # no step has begun yet
        self._sharded = self.watch is not None and bool(self.watch.sharded)  # for which the placement was made

    # ----------------------------------------------------------------------------------------------- before the forwards

    def begin(self, owner: Any, losses: Losses) -> None:
        """The step's members are known. Refuses to train nothing; decides the placement; prepares the forwards."""
        if not owner.active.rows:
            causes.refuse_idle(owner)
        if self.watch is not None and bool(self.watch.sharded) != self._sharded:  # by fully_shard, since
            self._sharded = bool(self.watch.sharded)
            if isinstance(self.wanted, str):
                self._replace(owner, self.wanted, self.sixteen_bit, prefetch=owner.prefetch)
        if self.wanted == "auto" and (self._active is None or self._active() is not owner.active):
            self.decide(owner)
            self._active = weakref.ref(owner.active)
        first, self._first = self._first, False
        if first and losses.batches is None and (steps := frameworks.loses_batches()):
            self.warn("batches", causes.lost_batches(steps))
        watch, params = self.watch, owner.active.ends
        self._grads = params[0].grad, params[-1].grad
        self._draws = losses.draws = None
        if owner.paired_randomness is True or (
            watch is not None and watch.random and self.pairs(owner.paired_randomness)
        ):
            devices = {p.device for p in owner.active.sweep.params} or {params[0].device}
            self._draws = losses.draws = pairing.Draws(devices)
        elif first and owner.paired_randomness == "auto" and not isinstance(losses, PerExample):  # its rows are tested
            self._looking = pairing.Looking({p.device for p in params})
        buffers = watch is not None and bool(watch.buffers.places)
        if watch is not None and buffers:
            watch.buffers.begin()
        sharded = watch is not None and bool(watch.sharded)
        drawing = self._draws is not None or self._looking is not None
        self.busy = buffers or sharded or drawing or "backward" in self._told

    def decide(self, owner: Any) -> None:
        """What "auto" is for the weights' types as they are now."""
        sixteen_bit = has_sixteen_bit(owner.param_groups)
        if sixteen_bit != self.sixteen_bit:
            self._replace(owner, "auto", sixteen_bit, prefetch=owner.prefetch)
            self.sixteen_bit = sixteen_bit

    def _replace(self, owner: Any, wanted: str, sixteen_bit: bool, *, prefetch: bool) -> None:
        made = placements.make(
            wanted, owner.module, sixteen_bit, owner._passes, scaled=owner.scaled, pipelined=owner.pipelined,
            prefetch=prefetch,
        )  # fmt: skip
        if owner.listeners and made.name != owner._placement.name and "inplace" in (made.name, owner._placement.name):
            raise RuntimeError(
                f"the weights' types have changed while a journal is written, and with them the placement, from "
                f"{owner._placement.name!r} to {made.name!r}; end the journal first, and convert the weights before a "
                "new one"
            )
        owner._placement = made

    def place_anew(self, owner: Any) -> None:
        """`prefetch` has changed. Nothing does where the placement is as it should be."""
        if placements.prefetches(owner._placement) == owner.prefetch:
            return
        if not isinstance(self.wanted, str):
            raise ValueError(placements.why_no_prefetch(owner._placement, self.wanted))
        self._replace(owner, self.wanted, self.sixteen_bit, prefetch=owner.prefetch)

    def give_way(self, owner: Any, refusal: placements.Refused) -> None:
        """Stream has refused the closure or the module: "auto" goes on with shadow, and says so.

        Raises:
            the refusal, where the placement was asked for by name, or where a copy would not be seen either.
        """
        if self.wanted != "auto" or owner._placement.name != "stream" or not refusal.shadow_serves:
            raise refusal
        self._replace(owner, "shadow", self.sixteen_bit, prefetch=False)
        without = ", where prefetch=True does nothing" if owner.prefetch else ""
        print(f"zokern: placement='auto' goes on with 'shadow'{without} ({refusal})", file=sys.stderr)

    def pairs(self, wanted: bool | str) -> bool:
        """Whether this step's forwards start from the same generator states."""
        if wanted != "auto" or self.watch is None:
            return wanted is True
        for module in self.watch.random:
            if module.training and pairing.draws(module):
                pairing.announce(module)
                return True
        return False

    # ------------------------------------------------------------------------------------------------- around a forward

    def probed(self) -> None:
        """A probe's closure has returned, or raised."""
        if self.watch is not None and self.watch.sharded:
            fsdp.let_go(self.watch.sharded)
        if self._draws is not None:
            self._draws.probed()
        if self._looking is not None:
            if self._looking.moved():
                self.warn("draws", causes.DRAWS)
            self._looking = None
        if self.watch is not None and self.watch.buffers.tensors:
            self.watch.buffers.put_back()

    # ------------------------------------------------------------------------------------------------ after the forwards

    def note(self, owner: Any, losses: Losses, every: Tensor, gate: Tensor | None, ledger: Ledger) -> None:
        """The step's losses, [P], before its last pass."""
        flats, values = self.flats, losses.values
        if not values or gate is not None or flats.there is not None or values[0] == values[-1]:
            flats.note(every, values, gate, ledger)
            self.due = True
        elif flats.numbers[STREAK]:  # the usual step on the host
            flats.note(every, values, gate, ledger)
        if losses.half is not None:
            self._half = losses.half
            if "half" not in self._told:
                self.warn("half", causes.half(losses.half))
        if "backward" not in self._told:
            params = owner.active.ends
            copies: Sequence[Tensor] = getattr(owner._placement, "copies", ())
            first, last = (params[0].grad, params[-1].grad)
            grown = (first is not None and first is not self._grads[0]) or (
                last is not None and last is not self._grads[1]
            )
            if losses.graph or grown or (copies and (copies[0].grad is not None or copies[-1].grad is not None)):
                self.warn("backward", causes.BACKWARD)

    def end(self, owner: Any, done: bool) -> None:
        """The step is over. done: its last pass was made."""
        if self._draws is not None:
            self._draws.end()
            self._draws = None
        if "backward" in self._told:
            for p in getattr(owner._placement, "copies", ()):  # where no zero_grad() comes
                p.grad = None
        if self.watch is not None and self.watch.buffers.tensors:
            self.watch.buffers.end(done)

    def tell(self, owner: Any) -> None:
        """Raises the warnings that are due, each once."""
        self.due = self.flats.there is not None and "flat" not in self._told
        if "flat" not in self._told:
            counts = self.flats.known()
            if counts is not None and counts[LONGEST] >= IN_A_ROW:
                self._told.add("flat")
                if not (owner.takes_rewards or owner.maximize):
                    whole = 2 * counts[WHOLE] > counts[COUNT]
                    self._pending["flat"] = causes.flat(owner, counts[COUNT], self._half, whole)
        if self._pending:
            pending, self._pending = self._pending, {}
            for message in pending.values():
                warnings.warn(message, ZokernWarning, stacklevel=5)

    def warn(self, subject: str, message: str) -> None:
        self._told.add(subject)
        self._pending[subject] = message
        self.due = True

    def memory(self) -> list[Tensor]:
        """What it keeps on the devices between steps."""
        kept = [] if self.watch is None else self.watch.buffers.memory()
        return kept if self.flats.there is None else [self.flats.there, *kept]


def has_sixteen_bit(groups: Iterable[dict[str, Any]]) -> bool:
    return any(p.element_size() == 2 for group in groups for p in group["params"])


def primed(owner: Any) -> bool:
    """A step without a closure: whether it is that by which torch's checkpoint functions make an optimizer's states
    (torch.distributed.checkpoint.state_dict), with lr 0 and gradients of zeros. Makes the states, as torch's own do.
    Waits for the device where there are gradients.
    """
    groups = owner.param_groups
    trained = [p for group in groups for p in group["params"] if p.requires_grad]
    if any(p.grad is None for p in trained) or any(float(group["lr"]) != 0.0 for group in groups):
        return False
    if any(bool(parts.local(p.grad).any()) for p in trained):
        return False
    for p in trained:
        state.of(owner.state, p, owner.state_spec)
    return True
