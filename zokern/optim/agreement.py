"""What the ranks of a step have to agree on, and how all of them hear of it where they do not.

A header goes before each rank's numbers, three integers: step and round; what the rank says of itself; a hash of what has
to be the same on all ranks. Where headers differ, or one says that its rank has raised, every rank sees it in the same
exchange, so all go on to a second one in which they tell each other why, and all raise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from zokern._checks import brief
from zokern.distributed.exchange import Exchange, RankError
from zokern.distributed.places import Places
from zokern.hashing import hash_of
from zokern.optim.agreed import at_start, fingerprint, whole
from zokern.optim.arriving import Arriving
from zokern.passes.update import CPU, sent
from zokern.placement.inplace import InPlace

HEADER = 4  # with the weight of the rank's losses
# What a rank says: its losses' sums follow; it has raised; losses of each example follow; it compares weights; it has no
# loss in this round; it waits for the others between two steps.
FINE, RAISED, VECTORS, COMPARES, NOTHING, WAITS = range(6)
PATIENCE = 10  # a rank waits as long as this many of its own rounds took, where that is more than exchange_timeout
COMPARING = 255  # where the number of a round stands
SHORTEST = HEADER + 2  # numbers of a rank, before it is known how many are needed


class Agreement:
    """Of one optimizer's ranks. where, round: the step and the round in it. comparing: they compare their starts; compared:
    they have. most: numbers of one rank in a round. stages: each rank has tensors that no other has, a pipeline's."""

    def __init__(self, places: Places) -> None:
        self.places, self.exchange = places, Exchange(places)
        self.where = self.round = self.most = 0
        self.compared = self.comparing = self.stages = False
        self.since, self.timeout = time.monotonic(), 0.0
        self.wrong: Tensor | None = None  # on a device: the first headers that did not agree
        self.looked: Arriving | None = None
        self.device = CPU  # of the losses

    @property
    def blind(self) -> bool:
        """Whether the losses are on a device, so that nobody may wait to look at what the others say."""
        return self.device.type != "cpu"

    def needed(self, owner: Any) -> int:
        """Numbers of one rank in a round, at most."""
        count: int = owner.forwards()
        return -(-max(count, 1) // self.places.shares)

    def header(self, status: int, fingerprint: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """A rank's numbers, without its losses. All are as long as was agreed upon last: gloo ends a process that gets a
        vector of another length than it has sent."""
        numbers = np.zeros(max(SHORTEST, HEADER + self.most))
        at = COMPARING if self.comparing else min(self.round, COMPARING - 1)
        numbers.view(np.int64)[:3] = self.where << 8 | at, status, fingerprint
        return numbers

    def gather(self, own: Tensor) -> Tensor:
        seconds = max(self.timeout, PATIENCE * (time.monotonic() - self.since))
        every = self.exchange.gather(
            own, seconds, "their start" if self.comparing else f"the losses of step {self.where}"
        )
        self.since = time.monotonic()
        return every

    # ------------------------------------------------------------------------------------------------ what a round says

    def check(self, header: list[list[int]], about: dict[str, Any], weights: Sequence[float] = ()) -> None:
        """about: what all have to agree on. weights: of each rank's losses.

        Raises:
            RankError: on every rank, where one has raised, or does something else.
        """
        raised = [i for i, one in enumerate(header) if one[1] == RAISED]
        if raised:
            self._hear(raised)
        kinds = {one[1] for one in header} - {NOTHING}
        if len(kinds) > 1 or any(one[::2] != header[0][::2] for one in header):
            kind = {FINE: "one", VECTORS: "of each example"}.get(header[self.places.me][1], "")
            place = {"the place": "comparing weights" if self.comparing else "a step"}
            doing = {**place, "the step": self.where, "the round": self.round, "the kind of loss": kind, **about}
            self._differ(self.exchange.objects(doing))
        self._check_parts(weights)
        if not kinds:
            self.compared = False
            raise RankError(
                f"no rank has a loss in step {self.where}: batches is empty on all of them, or all closures return None"
            )

    def _check_parts(self, weights: Sequence[float]) -> None:
        """Ranks that share out the directions of one part of the batch have the same batch.

        Raises:
            RankError: where its weight, or its number of micro-batches, is not the same.
        """
        first: dict[int, int] = {}
        for i, weight in enumerate(weights):
            other = first.setdefault(self.places.data[i], i) if self.places.counts[i] else i
            if weights[other] != weight:
                self.compared = False
                raise RankError(
                    f"batches are not the same on {self.places.named(other)} and {self.places.named(i)}, which share out "
                    f"the directions: they weigh {weights[other]:g} and {weight:g} in step {self.where}. Give both the "
                    "same; the weights are those of before the step"
                )

    def note(self, header: Tensor, apart: Tensor) -> None:
        """Of a round whose numbers are on a device: the first header that does not agree is kept for a later look."""
        if self.wrong is None:
            self.wrong = torch.full_like(header, -1)
        self.wrong = torch.where(apart & (self.wrong[0, 0] < 0), header, self.wrong)
        if self.looked is None:
            self.looked = Arriving(self.wrong)

    def look(self) -> None:
        """
        Raises:
            RankError: where a device has said by now that an earlier step was left out.
        """
        if self.looked is None or (header := self.looked.values()) is None:
            return
        self.looked = None
        if header[0][0] < 0:
            return
        raised = [self.places.named(i) for i, one in enumerate(header) if one[1] == RAISED]
        why = f"{' and '.join(raised)} raised in it" if raised else "ranks did other steps, or with other numbers"
        self.exchange.broken = f"step {header[0][0] >> 8} was left out on all ranks, and those since: {why}"
        raise RankError(f"{self.exchange.broken}. Start them again from the base weights and the journal")

    # --------------------------------------------------------------------------------------------------------- failures

    def tell(self, error: BaseException) -> None:
        """Takes part in the exchange that the others wait in, to say that this rank has failed."""
        self.compared = False
        if self.exchange.broken:
            return
        try:
            self.gather(sent(torch.from_numpy(self.header(RAISED, 0)), CPU if self.comparing else self.device))
            if self.comparing or not self.blind:
                self.exchange.objects(f"{type(error).__name__}: {str(error)[:500]}")
            else:  # the others hear of it later, and have gone on
                self.exchange.broken = f"this rank raised in step {self.where}"
        except RankError:
            pass  # this rank's own error says more

    def said_by(self, raised: Sequence[int]) -> list[str]:
        """What the ranks that have raised tell the others, who are here: all compare weights before they go on."""
        self.compared = False
        said = self.exchange.objects(None)
        return [f"{self.places.named(i)} raised {said[i]}" for i in raised]

    def _hear(self, raised: Sequence[int]) -> NoReturn:
        """
        Raises:
            RankError: with what the others raised.
        """
        raise RankError(
            f"{'; '.join(self.said_by(raised))} in step {self.where}: all ranks have left the step, and the weights are "
            "those of before it"
        )

    def _differ(self, said: Sequence[dict[str, Any]]) -> NoReturn:
        """
        Raises:
            RankError: naming what is not the same on all ranks.
        """
        self.compared = False
        lines = []
        for name in {name: None for one in said for name in one}:
            values = [one.get(name, "") for one in said]
            other = next((i for i, v in enumerate(values) if v != values[0] and "" not in (v, values[0])), 0)
            if other:
                a, b = brief(values[0]), brief(values[other])
                lines.append(f"{name} is {a} on {self.places.named(0)} and {b} on {self.places.named(other)}")
        raise RankError(
            f"the ranks do not do the same in step {self.where}: {'; '.join(lines) or 'one begins, and the others go on'}. "
            "Make them agree; the weights are those of before the step"
        )

    # -------------------------------------------------------------------------------------------------- the same start

    def compare(self, owner: Any) -> None:
        """Whether all ranks have the same weights, settings and step. Reads all weights.

        Raises:
            RankError: on every rank, naming what differs and where.
        """
        self.comparing = True
        about = at_start(owner, self.places)
        needed = self.needed(owner)
        every = self.gather(torch.from_numpy(self.header(COMPARES, fingerprint(about))))
        header = every.view(torch.int64)[:, :3].tolist()
        self.check([[*one[:2], 0] for one in header], {})
        if any(one != header[0] for one in header):
            self._differ_at_start(owner, about)
        self.compared, self.comparing, self.most = True, False, needed

    def _differ_at_start(self, owner: Any, about: dict[str, Any]) -> None:
        said = self.exchange.objects((about, {name: hash_of([(name, p)]) for name, p in whole(owner)}))
        abouts, hashes = [one[0] for one in said], [one[1] for one in said]
        names = [set(one) for one in hashes]
        if all(not (a & b) for i, a in enumerate(names) for b in names[:i]):
            abouts = [{k: v for k, v in one.items() if k not in ("tensors", "weights")} for one in abouts]
            if all(one == abouts[0] for one in abouts):
                self.stages = True
                return
        wrong = [(n, i) for n in hashes[0] for i, one in enumerate(hashes) if one.get(n, hashes[0][n]) != hashes[0][n]]
        if wrong and all(one == names[0] for one in names):
            self.compared = False
            name, i = wrong[0]
            raise RankError(
                f"weights are not the same on all ranks: {name!r} of {self.places.named(i)} is not that of "
                f"{self.places.named(0)} ({len({n for n, _ in wrong})} of {len(hashes[0])} tensors differ): load the same "
                f"checkpoint on every rank, or seed torch before the model is made{_in_place(owner)}"
            )
        first = {name for _, name, *_ in abouts[0]["tensors"]}
        for one, own in zip(abouts, names, strict=True):
            trained = {name for _, name, *_ in one["tensors"]}
            only = sorted((own ^ names[0]) | (trained ^ first))
            one["tensors"] = f"{len(trained)} trained of {len(own)}" + (
                f", others at {', '.join(only[:3])}" if only else ""
            )
            one["weights"] = ""
        self._differ(abouts)


def _in_place(owner: Any) -> str:
    """What may be the reason, after an error."""
    if not isinstance(owner._placement, InPlace) or not owner.counters["steps"]:
        return ""
    return (
        ". After an error in a step, weights that were perturbed in place are restored up to rounding, and not on every "
        "rank by the same way; placement='shadow' keeps every bit"
    )
