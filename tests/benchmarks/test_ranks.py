"""The simulated ring, against a ring of messages sent one by one."""

from __future__ import annotations

import heapq

import numpy as np
import pytest

from benchmarks.ranks.ring import Wire, gather, in_two_levels, notice

WIRE = Wire("a wire", 1e-5, 1e6)


def one_by_one(ready: np.ndarray, size: float) -> np.ndarray:
    """When each rank has all, by events: message k of a rank leaves once its message k - 1 has gone and k - 1 has come."""
    world, one = len(ready), WIRE.message(size)
    came = np.full((world, world), np.inf)  # [rank, how many have come]
    came[:, 0] = ready
    events = [(float(t), rank, 0) for rank, t in enumerate(ready)]
    heapq.heapify(events)
    left = [{0} for _ in range(world)]
    while events:
        _, rank, k = heapq.heappop(events)
        for r in (rank, (rank + 1) % world):  # its own next, and its neighbour's, may be able to go on
            before = (r - 1) % world
            if k + 1 < world and k + 1 not in left[r] and np.isfinite(came[r, k]) and np.isfinite(came[before, k]):
                left[r].add(k + 1)
                came[r, k + 1] = max(came[r, k], came[before, k]) + one
                heapq.heappush(events, (float(came[r, k + 1]), r, k + 1))
    return came[:, world - 1]


@pytest.mark.parametrize("world", [2, 3, 7, 16])
def test_a_gather_takes_what_its_messages_take(world: int) -> None:
    ready = np.random.default_rng(world).exponential(1e-4, world)
    np.testing.assert_allclose(gather(ready, 48.0, WIRE), one_by_one(ready, 48.0), rtol=1e-12)


def test_equal_ranks_take_a_message_for_each_other() -> None:
    assert gather(np.zeros(9), 48.0, WIRE) == pytest.approx(np.full(9, 8 * (1e-5 + 48e-6)))


def test_two_levels_take_fewer_messages() -> None:
    size = 48.0
    found = in_two_levels(np.zeros(64), size, WIRE, WIRE, 8)
    assert found == pytest.approx(np.full(64, 7 * WIRE.message(size) + 7 * WIRE.message(8 * size)))


def test_who_hears_of_a_loss_and_when() -> None:
    assert notice(6, 1, WIRE, 2.0, 5.0, silent=False) == pytest.approx([1e-5, 0.0, 1e-5, 2 + 2e-5, 4 + 3e-5, 2 + 2e-5])
    assert set(notice(6, 1, WIRE, 2.0, 5.0, silent=True)) == {0.0, 5.0}
