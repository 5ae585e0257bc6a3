"""Many ranks as threads of one process: all of a step but torch.distributed, which would take a process each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zokern.distributed.exchange import Exchange, RankError
from zokern.distributed.places import Places
from zokern.optim.ranks import Ranks


class Hub:
    """Where threads meet. A gather is over when all have come, or broken for all when one has not come in time."""

    def __init__(self, size: int) -> None:
        self.barrier, self.given = threading.Barrier(size), [None] * size

    def gather(self, place: int, own: Any, seconds: float) -> list[Any]:
        try:
            self.given[place] = own
            self.barrier.wait(seconds)
            every = list(self.given)
            self.barrier.wait(seconds)
        except threading.BrokenBarrierError as error:
            raise RankError("a rank has not come") from error
        return every


class Meeting(Exchange):
    """An Exchange of threads."""

    def __init__(self, places: Places, hub: Hub) -> None:
        super().__init__(places)
        self.hub = hub

    def gather(self, own: Tensor, seconds: float, what: str) -> Tensor:
        self.collectives, self.sent = self.collectives + 1, self.sent + own.nbytes
        return torch.stack(self.hub.gather(self.places.me, own.clone(), seconds))

    def objects(self, own: object) -> list[Any]:
        return self.hub.gather(self.places.me, own, 60.0)


def of_threads(size: int, shares: int, make: Callable[[int], Any], work: Callable[[int, Any], Any]) -> list[Any]:
    """work(place, optimizer) of each of `size` ranks, or what it raised. shares: of the directions; the rest are parts of
    the batch."""
    opts = [make(place) for place in range(size)]
    hub, found = Hub(size), [None] * size
    parts = size // shares
    data, share = tuple(i // shares for i in range(size)), tuple(i % shares for i in range(size))
    assert parts * shares == size

    def one(place: int) -> None:
        opt = opts[place]
        places = Places(tuple(range(size)), place, data, share, (True,) * size, "threads")
        opt._ranks, opt._decided = Ranks(places), True
        opt._ranks.exchange = Meeting(places, hub)
        try:
            found[place] = work(place, opt)
        except Exception as error:
            found[place] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=one, args=(place,)) for place in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
