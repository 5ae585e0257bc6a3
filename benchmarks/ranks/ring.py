"""How numbers go round a ring of many ranks, one message after another, and who notices when, if a rank is lost.

In an all-gather on a ring each rank passes on, W - 1 times, what it has last got: message k of rank r can leave once
message k - 1 has come from rank r - 1. A message takes `hop` seconds, and its bytes theirs. Messages are worked off in
their order, all ranks at once, so ten thousand ranks with their hundred million messages take seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Times = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True)
class Wire:
    """hop: seconds of a message, whatever its length. bandwidth: bytes a second."""

    name: str
    hop: float
    bandwidth: float

    def message(self, size: float) -> float:
        return self.hop + size / self.bandwidth


def gather(ready: Times, size: float, wire: Wire) -> Times:
    """When each rank has the numbers of all: ready [W], when its own are there; size: bytes of one rank's."""
    time, one = np.array(ready, np.float64), wire.message(size)
    for _ in range(len(ready) - 1):
        time = np.maximum(time, np.roll(time, 1)) + one
    return time


def in_two_levels(ready: Times, size: float, near: Wire, far: Wire, node: int) -> Times:
    """First within nodes of so many ranks, then between ranks of the same place in their nodes."""
    inner = np.concatenate([gather(ready[at : at + node], size, near) for at in range(0, len(ready), node)])
    nodes = inner.reshape(-1, node)
    return np.stack([gather(nodes[:, i], size * node, far) for i in range(node)], axis=1).reshape(-1)


def notice(world: int, lost: int, wire: Wire, leaving: float, timeout: float, *, silent: bool) -> Times:
    """When each rank has raised, in seconds from the loss of one in the exchange. leaving: that a rank takes from its own
    error to the end of its process, whose connections its neighbours see closed. silent: the machine has gone without a
    word, so that its own neighbours hear nothing. timeout: exchange_timeout. The lost one: 0."""
    distance = np.abs(np.arange(world) - lost)
    distance = np.minimum(distance, world - distance)
    heard = wire.hop * distance + leaving * np.maximum(distance - 1, 0)
    if silent:
        heard = heard + timeout
    return np.where(distance == 0, 0.0, np.minimum(heard, timeout))
