"""ZOTrainer in several processes, as torchrun starts them: one model, with the bits of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import zokern
from tests.integrations.many import run
from tests.integrations.tiny import arguments, equal, llama, rows, weights

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))

MOMENTUM = {"method": "mezo", "update": "momentum", "eps": 1e-2, "seed": 3}


def trained(folder: str, data: int = 24, zo: Any = MOMENTUM, cls: str = "ZOTrainer", **given: Any) -> dict[str, Any]:
    """One training, in this process of however many there are."""
    from zokern.integrations import transformers

    own = {name: given.pop(name) for name in ("callbacks", "optimizers") if name in given}
    resume, model = given.pop("resume", None), given.pop("model", None) or llama()
    args = arguments(Path(folder), **{"eval_strategy": "no", **given})
    made = globals()[cls]() if cls in globals() else getattr(transformers, cls)
    zo = None if own.get("optimizers") else zo
    trainer = made(model, args, train_dataset=rows(data, ragged=True), eval_dataset=rows(5), zo=zo, **own)
    trainer.train(resume_from_checkpoint=resume)
    history = [{k: v for k, v in one.items() if "runtime" not in k and "second" not in k and k != "epoch"}
               for one in trainer.state.log_history]  # fmt: skip
    return {
        "weights": weights(model), "log": history[:-1], "steps": trainer.state.global_step,
        "forwards": trainer.zo_optimizer.counters["forwards"], "tokens": trainer.state.num_input_tokens_seen,
        "sent": trainer.zo_optimizer.exchanged(), "ddp": trainer.model_wrapped is not trainer.model,
    }  # fmt: skip


def together(world: int, folder: Path, **given: Any) -> list[dict[str, Any]]:
    return run(world, _named, str(folder / "together"), given)


def _named(folder: str, given: dict[str, Any]) -> dict[str, Any]:
    return trained(folder, **given)


def one(folder: Path, **given: Any) -> dict[str, Any]:
    (found,) = run(1, _named, str(folder / "one"), given)
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_with_a_micro_batch_each_have_the_bits_of_one_process(tmp_path: Path, world: int) -> None:
    """The labels of each row are another number, so micro-batches weigh by their tokens. With evaluation, checkpoints, and
    weights that decay."""
    same = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1,
            "include_num_input_tokens_seen": "all"}  # fmt: skip
    alone = one(tmp_path, gradient_accumulation_steps=world, per_device_eval_batch_size=1, **same)
    found = together(world, tmp_path, per_device_eval_batch_size=1, **same)
    assert not equal(alone["weights"], weights(llama()))
    for rank in found:
        assert equal(rank["weights"], alone["weights"])
        assert [line["loss"] for line in rank["log"] if "loss" in line] == [
            line["loss"] for line in alone["log"] if "loss" in line
        ]
        losses = [[line["eval_loss"] for line in of["log"] if "eval_loss" in line] for of in (rank, alone)]
        assert len(losses[0]) == 2
        assert losses[0] == pytest.approx(losses[1])
        assert (rank["steps"], rank["forwards"], alone["forwards"]) == (6, 12, 12 * world)
        assert rank["tokens"] == alone["tokens"]
        assert not rank["ddp"]  # which would have memory for all gradients
    folder = tmp_path / "together"
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2", "checkpoint-4", "checkpoint-6", "journal.zkj"}
    base = llama()
    assert zokern.journal.replay(folder / "journal.zkj", base) == 6
    assert equal(weights(base), alone["weights"])


def Means() -> Any:
    from zokern.integrations.transformers import ZOTrainer

    class Trainer(ZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **named: Any) -> Any:
            return model(**inputs).loss

    Trainer.loss_is_scaled_for_ga = False
    return Trainer


def test_means_of_micro_batches(tmp_path: Path) -> None:
    alone = one(tmp_path, gradient_accumulation_steps=3, cls="Means")
    for rank in together(3, tmp_path, cls="Means"):
        assert equal(rank["weights"], alone["weights"])


@pytest.mark.parametrize("cls", ["ZOTrainer", "Means"])
def test_a_rank_out_of_data_waits_for_the_others(tmp_path: Path, cls: str) -> None:
    """19 rows are 10 micro-batches, of which the last has one row; the ranks have 4, 3 and 3 of them."""
    same = {"data": 19, "max_steps": -1, "num_train_epochs": 2, "cls": cls}
    alone = one(tmp_path, gradient_accumulation_steps=3, **same)
    found = together(3, tmp_path, accelerator_config={"even_batches": False}, **same)
    assert [rank["forwards"] for rank in found] == [16, 12, 12]
    for rank in found:
        assert rank["steps"] == alone["steps"] == 8
        assert equal(rank["weights"], alone["weights"])


def test_batches_that_are_filled_up_or_dropped(tmp_path: Path) -> None:
    """As accelerate hands them out: all ranks do the same steps."""
    for drop in (False, True):
        found = together(
            2, tmp_path, data=22, max_steps=-1, num_train_epochs=2, dataloader_drop_last=drop, logging_steps=50
        )
        assert {rank["steps"] for rank in found} == {10 if drop else 12}
        assert all(equal(rank["weights"], found[0]["weights"]) for rank in found)


def accumulated(folder: str) -> tuple[list[Tensor], list[Tensor]]:
    """Beside the same by hand: of each rank the batches that it is handed, one after another."""
    from zokern.integrations.transformers import ZOTrainer

    seen: list[Any] = []

    class Recording(ZOTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            seen.append((dict(inputs), num_items_in_batch))
            return super().training_step(model, inputs, num_items_in_batch)

    model, by = llama(), llama()
    args = arguments(Path(folder), gradient_accumulation_steps=2, max_steps=3, lr_scheduler_type="constant")
    Recording(model, args, train_dataset=rows(24, ragged=True), zo=MOMENTUM).train()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, seen)
    opt = zokern.MeZO(by, 1e-2, update="momentum", eps=1e-2, seed=3, process_group=None)
    by.train()
    for t in range(3):
        sums = [[of[2 * t], of[2 * t + 1]] for of in every]
        opt.step(
            lambda both: sum(by(**batch, num_items_in_batch=n).loss.double() for batch, n in both),
            sums,
            reduction="sum",
        )
    return weights(model), weights(by)


def test_accumulation_on_several_ranks(tmp_path: Path) -> None:
    for model, by_hand in run(2, accumulated, str(tmp_path)):
        assert equal(model, by_hand)


DIRECTIONS = {"mezo": {"num_samples": 3}, "fzoo": {"candidates": 4}, "hizoo": {}}


def shared(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for method, own in DIRECTIONS.items():
        zo = {"method": method, "eps": 1e-2, "placement": "shadow", **own, **settings}
        found[method] = trained(
            f"{folder}/{method}", zo=zo, learning_rate=1e-3, max_steps=3, include_num_input_tokens_seen="all",
            eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=1,
        )  # fmt: skip
    return found


def logged(found: dict[str, Any], name: str) -> list[float]:
    return [line[name] for line in found["log"] if name in line]


def test_shared_directions_have_the_bits_of_one_process(tmp_path: Path) -> None:
    """Every rank is handed the same batches, whose tokens are counted once."""
    (alone,) = run(1, shared, str(tmp_path / "alone"), {})
    for rank in run(3, shared, str(tmp_path / "shared"), {"parallel": "directions"}):
        for method, found in rank.items():
            assert equal(found["weights"], alone[method]["weights"]), method
            assert logged(found, "loss") == logged(alone[method], "loss")
            assert logged(found, "eval_loss") == pytest.approx(logged(alone[method], "eval_loss"))
            assert found["tokens"] == alone[method]["tokens"]
            assert found["forwards"] < alone[method]["forwards"]


def on_a_mesh(folder: str) -> dict[str, Any]:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "directions"))
    zo = {"num_samples": 2, "placement": "shadow", "eps": 1e-2, "process_group": mesh}
    return trained(folder, zo=zo, learning_rate=1e-3, max_steps=3, include_num_input_tokens_seen="all")


def test_parts_of_the_batch_and_shares_of_the_directions(tmp_path: Path) -> None:
    zo = {"num_samples": 2, "placement": "shadow", "eps": 1e-2}
    same = {"zo": zo, "learning_rate": 1e-3, "max_steps": 3, "include_num_input_tokens_seen": "all"}
    alone = one(tmp_path, gradient_accumulation_steps=2, **same)
    for rank in run(4, on_a_mesh, str(tmp_path / "mesh")):
        assert equal(rank["weights"], alone["weights"])
        assert (rank["forwards"], alone["forwards"]) == (6, 24)
        assert rank["tokens"] == alone["tokens"]


# The Trainer before transformers 5.18 asks torch to load its optimizer's state to "cpu:0", which torch does not know.
@pytest.mark.skipif(RELEASE < (5, 18), reason="needs transformers >= 5.18")
@pytest.mark.parametrize("parallel", ["data", "directions"])
def test_resumes_bit_for_bit_on_all_ranks(tmp_path: Path, parallel: str) -> None:
    zo = {**MOMENTUM, "num_samples": 2, "parallel": parallel, "placement": "shadow"}
    same = {"zo": zo, "save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    whole = together(2, tmp_path, **same)
    resume = str(tmp_path / "together" / "checkpoint-2")
    for rank in together(2, tmp_path, resume=resume, **same):
        assert rank["steps"] == 5
        assert equal(rank["weights"], whole[0]["weights"])
    base = llama()
    assert zokern.journal.replay(tmp_path / "together" / "journal.zkj", base) == 5
    assert equal(weights(base), whole[0]["weights"])


def unlike(folder: str) -> list[Tensor]:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.add_(dist.get_rank())  # as a new head that was not seeded
    return trained(folder, model=model)["weights"]


def test_all_ranks_start_from_the_weights_of_the_first(tmp_path: Path) -> None:
    a, b = run(2, unlike, str(tmp_path))
    assert equal(a, b)


def waits(folder: str) -> list[int]:
    """At which steps ranks wait for each other, however long that takes."""
    from zokern.integrations.transformers import ZOTrainer

    found: list[int] = []

    class Watched(ZOTrainer):
        def create_optimizer(self, *args: Any) -> Any:
            made = super().create_optimizer(*args)
            wait = made.wait_for_ranks
            made.wait_for_ranks = lambda: (found.append(made.counters["steps"]), wait())
            return made

    args = arguments(
        Path(folder), max_steps=7, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=5
    )
    Watched(llama(), args, train_dataset=rows(16), eval_dataset=rows(3)).train()
    return found


def test_work_of_one_rank_alone_is_waited_for(tmp_path: Path) -> None:
    """At the start, after checkpoints and evaluations, and where an epoch of 4 steps begins: nobody is late for the step
    after it. Other steps have their own exchange only."""
    assert run(2, waits, str(tmp_path)) == [[0, 0, 2, 4, 5, 6]] * 2


def refusals(folder: str) -> list[str]:
    found = []
    groups = [dist.new_group([0]), dist.new_group([1])]
    for zo in ({"process_group": None}, {"process_group": groups[dist.get_rank()]}, {"parallel": "tokens"}):
        with pytest.raises(ValueError) as raised:
            trained(folder, zo=zo)
        found.append(str(raised.value))
    with pytest.raises(ValueError) as raised:
        trained(folder, optimizers=(zokern.MeZO(llama(), 1e-2, process_group=None), None))
    found.append(str(raised.value))
    with pytest.raises(ValueError) as raised:
        trained(folder, data=2, accelerator_config={"even_batches": False})
    found.append(str(raised.value))
    with pytest.raises(ValueError) as raised:
        trained(folder, zo={"parallel": "directions"}, accelerator_config={"dispatch_batches": True})
    found.append(str(raised.value))
    return found


def test_what_would_train_apart_is_refused(tmp_path: Path) -> None:
    said = run(2, refusals, str(tmp_path))
    assert said[0] == said[1]
    none, other, kind, given, empty, cut = said[0]
    assert none.startswith("ZOTrainer: process_group is None, and each of 2 processes is handed a part of every batch")
    assert "leave process_group out" in none
    assert "process_group is None" in other
    assert "parallel is 'tokens'" in kind
    assert given.startswith("ZOTrainer: process_group is None") or "none of" in given
    assert "process 1 of 2 has no micro-batch" in empty
    assert "dispatch_batches=True" in cut


def given(folder: str, parallel: str) -> tuple[list[Tensor], int]:
    model = llama()
    opt = zokern.MeZO(model, 1e-2, parallel=parallel, eps=1e-2, seed=3, update="momentum")
    found = trained(folder, model=model, optimizers=(opt, None))
    return found["weights"], opt.num_ranks


def test_an_optimizer_that_is_given(tmp_path: Path) -> None:
    alone = one(tmp_path, gradient_accumulation_steps=2)
    for found, ranks in run(2, given, str(tmp_path), "data"):
        assert ranks == 2
        assert equal(found, alone["weights"])


def test_without_counting_tokens_over_ranks_each_rank_weighs_the_same(tmp_path: Path) -> None:
    """As the Trainer's average_tokens_across_devices=False means it: the mean over ranks of their own means."""
    same = {"logging_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 1e-6}
    found = together(2, tmp_path, average_tokens_across_devices=False, **same)
    means, whole = one(tmp_path, cls="Means", gradient_accumulation_steps=2, **same), together(2, tmp_path, **same)
    assert all(equal(rank["weights"], found[0]["weights"]) for rank in found)
    losses = [[line["loss"] for line in of["log"]] for of in (found[0], means, whole[0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(losses[2], rel=1e-6)


def raising(folder: str) -> str:
    from zokern.integrations.transformers import ZOTrainer

    class Raising(ZOTrainer):
        def compute_loss(self, *args: Any, **named: Any) -> Any:
            if self.args.process_index == 1 and self.state.global_step == 2:
                raise ArithmeticError("a bad row")
            return super().compute_loss(*args, **named)

    trainer = Raising(llama(), arguments(Path(folder)), train_dataset=rows())
    with pytest.raises((ArithmeticError, zokern.RankError)) as raised:
        trainer.train()
    assert trainer.args.average_tokens_across_devices
    return str(raised.value)


def test_an_error_on_one_rank_ends_all_of_them(tmp_path: Path) -> None:
    first, second = run(2, raising, str(tmp_path))
    assert second == "a bad row"
    assert first.startswith("rank 1 raised ArithmeticError: a bad row in step 2")


def other_batches(folder: str) -> str:
    with pytest.raises(zokern.RankError) as raised:
        trained(folder, zo={"parallel": "directions"}, data_seed=dist.get_rank())
    return str(raised.value)


def test_other_batches_under_shared_directions_are_seen(tmp_path: Path) -> None:
    for said in run(2, other_batches, str(tmp_path)):
        assert said.startswith("parallel is 'directions', and the batch of rank 1 is not that of rank 0")
