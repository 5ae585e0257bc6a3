"""A loop with accelerate in several processes: one model, with the bits of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

import zokern
from tests.integrations.many import run
from tests.methods import equal, weights
from tests.models import small, tokens

pytest.importorskip("accelerate")

BATCHES = [tokens(i) for i in range(12)]


def loader() -> Any:
    return DataLoader(BATCHES, batch_size=1, collate_fn=lambda items: items[0])  # type: ignore[arg-type]


def looped(order: str, parallel: str | None, accumulation: int, apart: bool = False) -> dict[str, Any]:
    """One epoch. order: what is prepared first. apart: ranks' models start with other weights."""
    import accelerate

    from zokern.integrations.accelerate import prepare, prepare_loader

    accelerator = accelerate.Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
    bare = small()
    if apart:
        with torch.no_grad():
            next(bare.parameters()).add_(dist.get_rank())
    own = {"update": "momentum", "num_samples": 2, "placement": "shadow", "parallel": parallel}
    if order == "model first":
        model = accelerator.prepare(bare)
        opt = prepare(accelerator, zokern.MeZO(model, 1e-2, **own))
    else:
        opt = prepare(accelerator, zokern.MeZO(bare, 1e-2, **own))
        model = accelerator.prepare(bare)
    data = prepare_loader(accelerator, opt, loader())
    scheduler = accelerator.prepare(
        StepLR(opt.optimizer, accelerator.num_processes if parallel != "directions" else 1, gamma=0.9)
    )
    losses: list[Tensor] = []
    for batch in data:
        with accelerator.accumulate(model):
            loss = opt.step(model, batch)
            scheduler.step()
        losses += [] if loss is None else [loss]
    gathered = accelerator.gather_for_metrics(torch.tensor([accelerator.process_index])).tolist()
    return {
        "weights": weights(bare), "losses": torch.stack(losses), "ddp": isinstance(model, DistributedDataParallel),
        "forwards": opt.counters["forwards"], "gathered": gathered, "lr": scheduler.get_last_lr()[0],
        "waits": opt.exchanged()["collectives"] - len(losses),
    }  # fmt: skip


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_have_the_bits_of_one_process(world: int) -> None:
    (alone,) = run(1, looped, "optimizer first", None, world)
    ways = (("optimizer first", "data"), ("model first", None), ("model first", "data"))
    for order, parallel in ways if world == 2 else ways[:1]:
        for rank in run(world, looped, order, parallel, 1):
            assert equal(rank["weights"], alone["weights"]), order
            assert torch.equal(rank["losses"], alone["losses"])
            assert rank["ddp"] is (order == "model first")
            assert rank["forwards"] * world == alone["forwards"]
            assert rank["gathered"] == list(range(world))
            assert rank["waits"] == 2  # before the first step, and to compare weights


def test_shared_directions() -> None:
    (alone,) = run(1, looped, "optimizer first", None, 2)
    for rank in run(2, looped, "optimizer first", "directions", 2):
        assert equal(rank["weights"], alone["weights"])
        assert rank["forwards"] * 2 == alone["forwards"]
        assert rank["lr"] == pytest.approx(1e-2 * 0.9**6)


def test_a_model_that_is_prepared_starts_from_the_first_ranks_weights() -> None:
    a, b = run(2, looped, "optimizer first", "data", 1, True)
    assert equal(a["weights"], b["weights"])


def refusals() -> list[str]:
    import accelerate

    from zokern.integrations.accelerate import prepare, prepare_loader

    accelerator, found = accelerate.Accelerator(cpu=True), []

    def said(function: Any) -> None:
        with pytest.raises((ValueError, RuntimeError, TypeError)) as raised:
            function()
        found.append(str(raised.value))

    said(lambda: prepare(accelerator, zokern.MeZO(small(), 1e-2)))
    said(lambda: prepare(accelerator, zokern.MeZO(small(), 1e-2, process_group=None)))
    said(lambda: prepare_loader(accelerator, zokern.MeZO(small(), 1e-2, parallel="data"), loader()))
    model = small()
    opt = prepare(accelerator, zokern.MeZO(model, 1e-2, parallel="directions"))
    (data,) = [accelerator.prepare(loader())]
    said(lambda: [opt.step(model, batch) for batch in data])
    buffered = small()
    buffered.register_buffer("seen", torch.zeros(1))
    accelerator.prepare(buffered)
    said(lambda: prepare(accelerator, zokern.MeZO(buffered, 1e-2, parallel="directions")))
    return found


def test_what_would_train_apart_or_hang_is_refused() -> None:
    for auto, none, other, sharded, buffers in run(2, refusals):
        assert "give parallel='data'" in auto
        assert none.startswith("accelerate: process_group is None, and each of 2 processes")
        assert "zokern.integrations.accelerate.prepare, got MeZO" in other
        assert "the batch of rank 1 is not that of rank 0" in sharded
        assert "zokern.integrations.accelerate.prepare_loader(accelerator, optimizer, loader)" in sharded
        assert "prepare(accelerator, optimizer) before accelerator.prepare(model)" in buffers
