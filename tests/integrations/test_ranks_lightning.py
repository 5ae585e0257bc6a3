"""Lightning's Trainer with strategy="ddp" in several processes: one model, with the bits of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

import zokern
from tests.integrations.many import run
from tests.methods import equal, weights
from tests.models import tokens

pytest.importorskip("lightning")

BATCHES = [tokens(i) for i in range(12)]


def fit(folder: str, accumulation: int, **given: Any) -> tuple[Any, Any]:
    """As torchrun has it: Lightning finds the processes by the environment."""
    import lightning
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    from tests.integrations.modules import Loader, Tuner

    options, resume = given.pop("options", {"parallel": "data"}), given.pop("resume", None)
    taken_up = given.pop("taken_up", False)  # with a loader that goes on in the middle of an epoch
    data, split = given.pop("data", BATCHES), given.pop("split", True)
    world = dist.get_world_size()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=world, accumulate_grad_batches=accumulation, default_root_dir=folder,
        strategy=DDPStrategy(cluster_environment=TorchElasticEnvironment()) if world > 1 else "auto",
        **{"max_epochs": 1, **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar",
                                             "enable_model_summary"), False),
           "use_distributed_sampler": False, **given},
    )  # fmt: skip
    module = Tuner(num_samples=2, placement="shadow", **(options if world > 1 else {}))
    with torch.no_grad():  # the strategy gives all the weights of the first
        next(module.net.parameters()).add_(0.5 * dist.get_rank())
    # Lightning's own sampler shuffles the data of a training.
    sampler = DistributedSampler(data, shuffle=False) if split else None
    loader = DataLoader(data, batch_size=1, sampler=sampler, collate_fn=lambda items: items[0])  # type: ignore[arg-type]
    trainer.fit(module, Loader(BATCHES[dist.get_rank() :: world]) if taken_up else loader, loader, ckpt_path=resume)
    return trainer, module


def fitted(folder: str, accumulation: int, **given: Any) -> dict[str, Any]:
    trainer, module = fit(folder, accumulation, **given)
    (opt,) = trainer.optimizers
    return {
        "weights": weights(module.net), "steps": trainer.global_step, "forwards": opt.counters["forwards"],
        "validation": float(trainer.callback_metrics["validation"]), "ranks": opt.num_ranks,
        "reducers": hasattr(trainer.strategy.model, "reducer"),
    }  # fmt: skip


def shared(folder: str, accumulation: int, parallel: str) -> dict[str, Any]:
    return fitted(folder, accumulation, options={"parallel": parallel}, split=parallel == "data")


@pytest.mark.parametrize(("world", "parallel"), [(2, "data"), (3, "data"), (2, "directions")])
def test_ranks_have_the_bits_of_one_process(tmp_path: Path, world: int, parallel: str) -> None:
    accumulation = world if parallel == "data" else 2
    (alone,) = run(1, shared, str(tmp_path), accumulation, parallel)
    found = run(world, shared, str(tmp_path), accumulation // (world if parallel == "data" else 1), parallel)
    for rank in found:
        assert equal(rank["weights"], alone["weights"])
        assert (rank["ranks"], rank["steps"], rank["reducers"]) == (world, alone["steps"], False)
        assert rank["forwards"] * world == alone["forwards"]
    assert found[0]["validation"] == pytest.approx(alone["validation"], abs=0.5)  # of this rank's part


def resumed(folder: str) -> list[Tensor]:
    """Stopped after 2 of 3 steps, and taken up."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    keep = {"enable_checkpointing": True, "callbacks": [ModelCheckpoint(folder, "last", every_n_train_steps=2)]}
    trainer, module = fit(folder, 2, max_steps=2, taken_up=True, **keep)
    saved = trainer.checkpoint_callback.best_model_path
    _, again = fit(folder, 2, max_steps=3, resume=saved, taken_up=True)
    _, whole = fit(folder, 2, max_steps=3)
    assert not equal(weights(module.net), weights(whole.net))
    assert equal(weights(again.net), weights(whole.net))
    return weights(again.net)


def test_resumes_from_lightnings_checkpoint_on_all_ranks(tmp_path: Path) -> None:
    a, b = run(2, resumed, str(tmp_path))
    assert equal(a, b)


class Saved:
    """Of the middle of an accumulation."""

    def __new__(cls, path: str) -> Any:
        import lightning

        class Save(lightning.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
                if batch_idx == 2:
                    trainer.save_checkpoint(path)

        return Save()


def taken_up_within(folder: str) -> tuple[list[Tensor], list[Tensor]]:
    path = f"{folder}/within.ckpt"
    _, whole = fit(folder, 2, max_steps=3, taken_up=True, callbacks=[Saved(path)])
    _, again = fit(folder, 2, max_steps=3, taken_up=True, resume=path)
    assert again.forwards == whole.forwards[4 * 2 :]
    return weights(whole.net), weights(again.net)


def left_within(folder: str) -> None:
    with pytest.warns(zokern.ZokernWarning, match="wait in each of 2 processes, and now there are 1"):
        fit(folder, 2, max_steps=3, taken_up=True, resume=f"{folder}/within.ckpt")


def test_micro_batches_that_wait_are_saved_for_each_rank(tmp_path: Path) -> None:
    for whole, again in run(2, taken_up_within, str(tmp_path)):
        assert equal(whole, again)
    run(1, left_within, str(tmp_path))


def refusals(folder: str) -> list[str]:
    found = []
    for options, given in (
        ({}, {}),
        ({"process_group": None}, {}),
        ({"parallel": "data"}, {"data": BATCHES[: 3 + dist.get_rank()], "split": False}),
        ({"parallel": "directions"}, {}),
    ):
        with pytest.raises((RuntimeError, ValueError)) as raised:
            fit(folder, 1, options=options, **given)
        found.append(str(raised.value))
    return found


def test_what_would_train_apart_or_hang_is_refused(tmp_path: Path) -> None:
    for auto, none, uneven, other in run(2, refusals, str(tmp_path)):
        assert "give parallel='data'" in auto
        assert none.startswith("Lightning: process_group is None, and each of 2 processes")
        assert "have 3, 4 training batches" in uneven
        assert "limit_train_batches=3" in uneven
        assert "the batch of rank 1 is not that of rank 0" in other
        assert "use_distributed_sampler=False" in other


def ordinary(folder: str) -> bool:
    """Somebody's module with gradients, by the same strategy after one of ours."""
    import lightning

    from tests.integrations.modules import Plain

    class Gradients(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), 1e-2)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...

    trainer, _ = fit(folder, 1)
    seen = []
    trainer.callbacks.append(
        type(
            "Look", (lightning.Callback,), {"on_train_start": lambda s, t, m: seen.append(hasattr(t.model, "reducer"))}
        )()
    )
    loader = DataLoader(BATCHES, batch_size=1, collate_fn=lambda items: items[0])  # type: ignore[arg-type]
    trainer.fit_loop.epoch_progress.reset()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Gradients(), loader)
    return bool(seen[0])


def test_other_modules_keep_their_wrapper(tmp_path: Path) -> None:
    assert run(2, ordinary, str(tmp_path)) == [True, True]
