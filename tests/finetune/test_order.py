"""The order in which texts are drawn."""

from __future__ import annotations

import torch

from zokern.finetune.batches import Order


def test_it_goes_by_the_seed_alone() -> None:
    """Each text once an epoch; the same order for the same seed, whatever else draws, and another one for another."""
    drawn = {}
    for seed in (0, 1, 2):
        torch.manual_seed(7 + seed)
        order, again = Order(40, seed), Order(40, seed)
        drawn[seed] = order.draw(100)
        torch.rand(3)
        assert [i for _ in range(10) for i in again.draw(10)] == drawn[seed]
        assert sorted(drawn[seed][:40]) == sorted(drawn[seed][40:80]) == list(range(40))
        assert drawn[seed][:40] != drawn[seed][40:80]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
