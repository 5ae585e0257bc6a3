"""Hundreds of ranks, as threads: the bits of one process, one exchange a round, failures known to all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.distributed.threads import of_threads
from tests.methods import equal, weights
from tests.models import seeded

MANY = 64


def model() -> nn.Module:
    return seeded(lambda: nn.Linear(3, 2), spread=0.3)


def batch(step: int, part: int) -> Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(1000 * step + part))


def make(cls: Any, **options: Any) -> Any:
    return lambda place: cls(model(), 1e-2, placement="shadow", **options)


@pytest.mark.parametrize(
    ("shares", "cls", "options"),
    [
        (1, zokern.MeZO, {}),
        (8, zokern.FZOO, {"candidates": 15}),
        (MANY, zokern.ES, {"num_directions": MANY, "maximize": True}),
    ],
)
@pytest.mark.filterwarnings("ignore:a step moves")
def test_bits_are_those_of_one_process(shares: int, cls: Any, options: dict[str, Any]) -> None:
    parts = MANY // shares

    def work(place: int, opt: Any) -> tuple[list[Tensor], int, int]:
        for t in range(2):
            opt.step(lambda x: opt.module(x).square().mean(), [batch(t, place // shares)])
        return weights(opt.module), opt.counters["forwards"], opt.exchanged()["collectives"]

    found = of_threads(MANY, shares, make(cls, **options), work)
    alone = make(cls, **options)(0)
    for t in range(2):
        alone.step(lambda x: alone.module(x).square().mean(), [batch(t, part) for part in range(parts)])
    for end, forwards, collectives in found:
        assert equal(end, weights(alone.module))
        assert forwards == alone.counters["forwards"] // MANY
        assert collectives == 3  # the start, and one a step


def test_one_that_raises_is_named_on_all_others() -> None:
    def work(place: int, opt: Any) -> str:
        def closure() -> Tensor:
            if place == 37 and opt.counters["steps"] == 1:
                raise ValueError("bad sample 17")
            return opt.module(batch(0, place)).square().mean()

        opt.step(closure)
        with pytest.raises((zokern.RankError, ValueError)) as error:
            opt.step(closure)
        return str(error.value)

    found = of_threads(MANY, 1, make(zokern.MeZO), work)
    assert found[37] == "bad sample 17"
    assert set(found) - {"bad sample 17"} == {
        "rank 37 raised ValueError: bad sample 17 in step 1: all ranks have left the step, and the weights are those of "
        "before it"
    }


def test_one_that_does_not_come_is_missed_by_all() -> None:
    def work(place: int, opt: Any) -> int:
        for _ in range(1 if place == 5 else 2):
            opt.step(lambda: opt.module(batch(0, place)).square().mean())
        return int(opt.counters["steps"])

    found = of_threads(MANY, 1, make(zokern.MeZO, exchange_timeout=1.0), work)
    assert found[5] == 1
    assert all(isinstance(one, zokern.RankError) for i, one in enumerate(found) if i != 5)
