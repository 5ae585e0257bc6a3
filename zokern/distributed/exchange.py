"""A few numbers of each rank, gathered on all of them, in rank order: the only words that ranks exchange in a step.

No sum is left to the engine: an all-reduce promises no order of its additions (from three ranks on gloo's depends on where
in the vector a number stands), so ranks gather, and each adds for itself, one rank after another.
"""

from __future__ import annotations

import datetime
import weakref
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from zokern.distributed.places import Places


class RankError(RuntimeError):
    """Another rank has failed, is missing, or does another step than this one; the weights are those of before the step."""


# Groups of this module's own, by the ranks: so no other collective of the job can come between two exchanges. A job that
# ends and begins anew has others. torch holds them until destroy_process_group(): one that lives on to the end of the
# process may abort it.
_groups: weakref.WeakKeyDictionary[Any, weakref.WeakValueDictionary[tuple[int, ...], Any]] = weakref.WeakKeyDictionary()


TELLING = 60.0  # seconds that ranks have to say what went wrong


def forget(ranks: tuple[int, ...]) -> None:
    """A group has failed; whoever needs it again makes another."""
    known = _groups.get(dist.group.WORLD)
    if known is not None:
        known.pop(ranks, None)


def _on_hosts(ranks: tuple[int, ...], seconds: float) -> Any:
    """The gloo group of these ranks. All of them come here at the same time."""
    known = _groups.setdefault(dist.group.WORLD, weakref.WeakValueDictionary())
    group = known.get(ranks)
    if group is None:
        group = known[ranks] = dist.new_group(
            list(ranks), backend="gloo", timeout=datetime.timedelta(seconds=seconds), use_local_synchronization=True,
            group_desc="zokern",
        )  # fmt: skip
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=TELLING), group)
    return group


class Exchange:
    """Of the ranks of `places`. broken: why nothing can be gathered any more, "" while it can. collectives, sent: how many
    there were, and the bytes that this rank has sent."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.broken = ""
        self.collectives = self.sent = 0
        # Where in a group each place is: torch sorts the ranks of a new group, and a mesh need not.
        group = {rank: i for i, rank in enumerate(sorted(places.ranks))}
        self._order = [group[rank] for rank in places.ranks]

    def check(self) -> None:
        """
        Raises:
            RankError: where nothing can be gathered any more.
        """
        if self.broken:
            raise RankError(
                f"{self.broken}, and the ranks have not exchanged a number since: start them again from the base weights "
                "and the journal"
            )

    def gather(self, own: Tensor, seconds: float, what: str) -> Tensor:
        """own: of one shape on all ranks, on the host or on a device; returns [ranks, *shape]. seconds: that a rank on the
        host waits for the others. what: they are to come to, in words.

        Raises:
            RankError: where a rank does not come.
        """
        self.check()
        self.collectives += 1
        self.sent += own.nbytes
        every = torch.empty((self.places.size, *own.shape), dtype=own.dtype, device=own.device)
        if own.device.type != "cpu" and self.places.backend(own.device.type) not in (None, "gloo"):
            dist.all_gather_into_tensor(every.view(-1), own.view(-1), group=self.places.parent)
            return self._in_order(every)
        host = every if every.device.type == "cpu" else torch.empty(every.shape, dtype=every.dtype)
        try:
            group = _on_hosts(self.places.ranks, seconds)
            options = dist.distributed_c10d.AllgatherOptions()  # type: ignore[attr-defined]
            options.timeout = datetime.timedelta(seconds=seconds)
            group._allgather_base(host.view(-1), own.cpu().view(-1), options).wait()
        except RuntimeError as error:  # a rank is gone or late, and with it the group
            forget(self.places.ranks)
            self.broken = f"{self._missing(error, seconds)} {what}"
            raise RankError(
                f"{self.broken}. Weights are those of before the step; {_advice(error)}. (torch: {_first_line(error)})"
            ) from error
        return self._in_order(host).to(every.device)

    def objects(self, own: object) -> list[Any]:
        """One object of each rank; for what goes wrong, where time does not count."""
        every: list[Any] = [None] * self.places.size
        try:
            dist.all_gather_object(every, own, group=_on_hosts(self.places.ranks, TELLING))
        except RuntimeError as error:
            self._lost(error, "a rank was lost while the ranks told each other what went wrong")
        return [every[i] for i in self._order]

    def from_first(self, part: Tensor, seconds: float, what: str) -> None:
        """part: on the host, of one shape on all ranks; filled with the first rank's. seconds: that a rank waits. what:
        this is, in words.

        Raises:
            RankError: where a rank is lost.
        """
        self.collectives += 1
        try:
            group = _on_hosts(self.places.ranks, seconds)
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = self._order[0], 0
            options.timeout = datetime.timedelta(seconds=seconds)
            group.broadcast([part], options).wait()
        except RuntimeError as error:
            self._lost(error, f"a rank was lost while {what} was sent to all")

    def _lost(self, error: RuntimeError, what: str) -> NoReturn:
        """
        Raises:
            RankError: always; nothing can be gathered any more.
        """
        forget(self.places.ranks)
        self.broken = what
        raise RankError(f"{what} (torch: {_first_line(error)})") from error

    def _in_order(self, every: Tensor) -> Tensor:
        if self._order == sorted(self._order):
            return every
        return torch.stack([every[i] for i in self._order])

    def _missing(self, error: RuntimeError, seconds: float) -> str:
        if _is_late(error):
            return f"a rank has not come within {seconds:.3g} s to"
        return "the connection to a rank was lost at"


def _is_late(error: RuntimeError) -> bool:
    said = str(error).lower()
    return "timed out" in said or "timeout" in said


def _advice(error: RuntimeError) -> str:
    if _is_late(error):
        return (
            "every rank has to do each step: where one evaluates or saves alone, let the others wait at "
            "opt.wait_for_ranks(), or give a longer exchange_timeout"
        )
    return "look at that rank's own error, and start all of them again from the base weights and the journal"


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
