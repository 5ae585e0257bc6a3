"""A step of several ranks: probes shared out, losses put together in rank order.

In each round every rank sends one vector, float64: a header (agreement.py), the weight of its part of the batch, and sums
of losses. A probe's loss is sum_d s_d / sum_d w_d over the parts d of the batch, each sum in rank order, element by
element. So the bits are the same on every rank, and those of one process with as many micro-batches. s_d is the weighted
sum of rank d's micro-batches, w_d their weights' sum.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zokern.distributed.exchange import RankError
from zokern.distributed.places import Places
from zokern.interrupts import HeldInterrupts
from zokern.optim.agreed import fingerprint, in_a_round
from zokern.optim.agreement import FINE, HEADER, NOTHING, RAISED, VECTORS, WAITS, Agreement
from zokern.optim.losses import Losses
from zokern.optim.numbers import HostNumbers
from zokern.passes.update import CPU, Terms, sent
from zokern.placement.inplace import InPlace

FOREVER = 1e7  # seconds
Evaluate = Callable[[list[Terms]], list[Tensor]]


class Ranks(Agreement):
    """Of one optimizer: which probes this rank evaluates, and what all ranks make of the losses."""

    def __init__(self, places: Places) -> None:
        super().__init__(places)
        self.rounds = 1  # of a step, as far as is known
        self.pending = False  # the others wait for this rank's numbers
        self.steps = 0  # since the weights were compared
        self.walked = self.walking = False  # in place: this round's perturbations
        self.drawn = ""
        # By the share of the directions: the places whose losses make up those of its probes.
        self._of_share: list[list[int]] = [[] for _ in range(places.shares)]
        for i, (share, counts) in enumerate(zip(places.share, places.counts, strict=True)):
            if counts:
                self._of_share[share].append(i)

    @contextlib.contextmanager
    def step(self, owner: Any) -> Iterator[None]:
        """Around a step. Whatever this rank raises before its last exchange, the others are told."""
        self._begin(owner)
        self.pending, self.walked, self.drawn = True, False, ""
        try:
            self.look()
            if self.comparing or (owner.compare_every and self.steps >= owner.compare_every):
                self.compare(owner)
                self.steps = 0
            yield
            self.rounds, self.steps = self.round, self.steps + 1
        except RankError:
            raise
        except BaseException as error:
            if self.pending:
                self._walk(owner)
                self.tell(error)
            raise

    def _walk(self, owner: Any) -> None:
        """In place the others have been through the round's perturbations, and this rank has raised before it came to
        them: it goes the same way, so that all weights are rounded alike."""
        if self.walked or self.comparing or not isinstance(owner._placement, InPlace):
            return
        self.walking = True
        with contextlib.suppress(Exception), HeldInterrupts() as interrupts:  # its own error is the one that is told
            numbers = HostNumbers(owner.param_groups, owner.seed, self.where, owner.schedule)
            owner._step(Losses(lambda: 0.0, shared=True), numbers, interrupts)
        self.walking = False

    def wait(self, owner: Any) -> None:
        """Until all ranks have come here, however long that takes.

        Raises:
            RankError: where one is elsewhere.
        """
        self._begin(owner, "wait_for_ranks")
        own = torch.from_numpy(self.header(WAITS, 0))
        every = self.exchange.gather(own, FOREVER, "opt.wait_for_ranks()")
        self.check(every.view(torch.int64)[:, :3].tolist(), {"the place": "opt.wait_for_ranks()"})

    def _begin(self, owner: Any, what: str = "step") -> None:
        """Where this rank is, for what it tells the others next.

        Raises:
            RankError, RuntimeError: where nothing can be told any more, and inside a step.
        """
        self.exchange.check()
        if owner._turn.lock.locked():
            owner._turn.refuse(what)
        self.where, self.round, self.since = owner._passes.counters.steps, 0, time.monotonic()
        self.comparing, self.timeout = not self.compared or self.needed(owner) != self.most, owner.exchange_timeout

    # ---------------------------------------------------------------------------------------------------------- probes

    def share_of(self, share: int, count: int) -> range:
        """The probes of a round of so many that a share of the directions has."""
        return range(share * count // self.places.shares, (share + 1) * count // self.places.shares)

    def evaluate(self, owner: Any, losses: Losses, evaluate: Evaluate, probes: list[Terms]) -> list[Tensor]:
        """The losses of a round's probes, as all ranks have them. `evaluate` has this rank's."""
        self.pending = True
        own = self.share_of(self.places.share[self.places.me], len(probes))
        if len(own) > self.most:
            raise ValueError(
                f"{type(owner).__name__}.rounds() gives {len(probes)} probes, and its forwards() says {owner.forwards()} "
                "for a whole step; make them agree"
            )
        losses.partial = self.stages or not self.places.counts[self.places.me]
        if losses.draws is not None and self.places.shares > 1 and not self.round:
            self.drawn = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=8).hexdigest()
        found = self._own(owner, losses, evaluate, probes, own)
        if found:
            self.device = found[0].device
        if len({loss.shape for loss in found}) > 1:
            raise TypeError(
                f"closure returned losses of {len(found[0])} examples for one probe and of another number for another; "
                "return the same for all"
            )
        whole = not (self.stages or self.places.sharded)
        about = in_a_round(owner, losses, probes, whole, self.drawn)
        every = self.gather(self._numbers(owner, losses, found, fingerprint(about)))
        header, apart = every.view(torch.int64)[:, :3], None
        try:
            vectors = bool(found) and found[0].dim() > 0
            if not self.blind:
                said = header.tolist()
                self.check(said, about, every[:, HEADER - 1].tolist())
                vectors = any(one[1] == VECTORS for one in said)
            else:
                apart = (header[:, ::2] != header[:1, ::2]).any() | (header[:, 1] == RAISED).any()
                if owner.numbers.device is None:
                    self.note(header, apart)
            if vectors:
                return self._vectors(found, len(probes))
            return self._together(every, apart, losses.reduction == "mean", len(probes))
        finally:
            self.round += 1
            self.pending = self.round < self.rounds

    def _own(self, owner: Any, losses: Losses, evaluate: Evaluate, probes: list[Terms], own: range) -> list[Tensor]:
        """This rank's losses. In place all ranks take the same way, so that the weights are rounded alike on all."""
        if self.walking:
            for terms in probes:
                owner._placement.present(terms)
            raise RankError("all has been gone through")
        if losses.empty:
            own = range(0)
        elif not own and self.round == 0 and losses.draws is not None:
            evaluate(probes[:1])  # what it draws is drawn on all ranks
        if not isinstance(owner._placement, InPlace):
            return evaluate([probes[i] for i in own]) if own else []
        found: list[Tensor] = []
        reached, self.walked = 0, True
        try:
            for i, terms in enumerate(probes):
                reached = i + 1
                if i in own:
                    found += evaluate([terms])
                else:
                    owner._placement.present(terms)
        except BaseException:
            for terms in probes[reached:]:
                owner._placement.present(terms)
            raise
        return found

    # ------------------------------------------------------------------------------------------------------- exchanges

    def _numbers(self, owner: Any, losses: Losses, found: list[Tensor], agreed: int) -> Tensor:
        weight = losses.weight if self.places.counts[self.places.me] else 0.0
        status = NOTHING if not found or not weight else VECTORS if found[0].dim() else FINE
        own = self.header(status, agreed)
        own[HEADER - 1] = weight
        if owner.numbers.device is None:
            numbers = sent(torch.from_numpy(own), self.device)
        else:  # a captured step, whose number is in the device's memory, and to which the host may send nothing
            numbers = torch.zeros(len(own), dtype=torch.float64, device=self.device)
            numbers.view(torch.int64)[0] = owner.numbers.step * 256 + self.round
            for at, value in ((1, status), (2, agreed)):
                numbers.view(torch.int64)[at].fill_(value)
            numbers[HEADER - 1].fill_(weight)
        if status == FINE:
            numbers[HEADER : HEADER + len(found)] = torch.stack(found)
        return numbers

    def _together(self, every: Tensor, apart: Tensor | None, mean: bool, count: int) -> list[Tensor]:
        """[ranks, L] -> the losses of the round's probes. apart: on a device, where nobody may look, whether ranks do not
        agree; they are no numbers then, so that the step is left out on all ranks."""
        whole: list[Tensor] = []
        for share in range(self.places.shares):
            total = _added(every, self._of_share[share])
            sums = total[HEADER:] / total[HEADER - 1] if mean else total[HEADER:]
            whole += sums[: len(self.share_of(share, count))].unbind()
        return whole if apart is None else [loss.masked_fill(apart, torch.nan) for loss in whole]

    def _vectors(self, found: list[Tensor], count: int) -> list[Tensor]:
        """The losses of each example, of all ranks one after another; two more exchanges, for methods that ask for them."""
        length = len(found[0]) if found and self.places.counts[self.places.me] else 0
        lengths = self.gather(torch.tensor([length], dtype=torch.int64, device=CPU)).flatten().tolist()
        own = torch.zeros((self.most, max(lengths)), dtype=torch.float64, device=CPU)
        for i, one in enumerate(found if length else ()):
            own[i, :length] = one
        every, whole = self.gather(own), []
        for share in range(self.places.shares):
            for k in range(len(self.share_of(share, count))):
                whole.append(torch.cat([every[i, k, : lengths[i]] for i in self._of_share[share]]).to(self.device))
        return whole


def _added(every: Tensor, at: list[int]) -> Tensor:
    """The sum of these rows, one after another, element by element."""
    if every.device.type == "cpu":
        return torch.from_numpy(np.add.accumulate(every.numpy()[at], axis=0)[-1])
    rows = every.unbind()
    return functools.reduce(torch.add, [rows[i] for i in at])
