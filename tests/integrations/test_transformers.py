"""ZOTrainer: the steps are those of a loop by hand, and go on bit for bit from the Trainer's own checkpoint."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zokern
from tests.integrations.tiny import arguments, counted, equal, llama, rows, weights

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
from transformers import EarlyStoppingCallback  # noqa: E402

from zokern.integrations.transformers import ZOTrainer  # noqa: E402


@pytest.fixture(autouse=True)
def quick() -> None:
    torch.set_num_threads(1)


def by_hand(model: torch.nn.Module, steps: list[tuple[list[Any], Any, float]], **settings: Any) -> list[Tensor]:
    """The same steps with zokern's optimizer alone: the sum of tokens' losses over the number of tokens."""
    opt = zokern.MeZO(model, lr=1.0, **settings)
    model.train()
    for batches, count, lr in steps:
        opt.param_groups[0]["lr"] = lr
        opt.step(lambda batch, n=count: model(**batch, num_items_in_batch=n).loss, batches, reduction="sum")
    return weights(model)


class Recording(ZOTrainer):
    """Keeps what its steps were made of."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        seen: list[Any] = self.__dict__.setdefault("seen", [])
        if not self._micro:
            seen.append(([], num_items_in_batch, float(self.optimizer.param_groups[0]["lr"])))
        seen[-1][0].append(dict(inputs))
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_are_those_of_a_loop_by_hand(tmp_path: Path, accumulation: int) -> None:
    """With labels left out: each micro-batch weighs by its tokens. 24 rows are 4 steps of 6: an epoch ends within."""
    model = llama()
    by = copy.deepcopy(model)
    args = arguments(
        tmp_path, gradient_accumulation_steps=accumulation, warmup_steps=2, lr_scheduler_type="cosine", max_steps=5
    )
    trainer = Recording(model, args, train_dataset=rows(23, ragged=True), zo={"eps": 1e-2, "seed": 3})
    trainer.train()
    assert [len(batches) for batches, *_ in trainer.seen] == ([1] * 5 if accumulation == 1 else [3, 3, 3, 3, 3])
    assert trainer.zo_optimizer.counters["forwards"] == 2 * sum(len(batches) for batches, *_ in trainer.seen)
    assert equal(weights(model), by_hand(by, trainer.seen, eps=1e-2, seed=3))
    assert not equal(weights(model), weights(llama()))
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert all(2.5 < loss < 3.5 for loss in losses), losses  # of a token, however many micro-batches


METHODS: dict[str, Any] = {
    "plain": "mezo",
    "momentum": {"method": "mezo", "update": "momentum"},
    "adam": {"method": "mezo", "update": "adam"},
    "adamezo": {"method": "mezo", "update": "adamezo"},
    "hizoo": {"method": "hizoo"},
    "helene": {"method": "helene"},
    "lezo": {"method": "lezo", "num_dropped": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("placement", ["inplace", "shadow", "stream"])
@pytest.mark.parametrize("method", METHODS)
def test_resumes_bit_for_bit(tmp_path: Path, method: str, placement: str, dtype: torch.dtype) -> None:
    """With dropout and micro-batches, from the checkpoint in the middle; the journal replays the whole run."""
    zo = {"method": METHODS[method]} if isinstance(METHODS[method], str) else METHODS[method]
    zo = {**zo, "placement": placement, "eps": 1e-2}
    data = rows()

    def trainer(model: torch.nn.Module) -> ZOTrainer:
        args = arguments(
            tmp_path, save_strategy="steps", save_steps=2, max_steps=4, gradient_accumulation_steps=2, weight_decay=0.1
        )
        return ZOTrainer(model, args, train_dataset=data, zo=zo)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this step moves", zokern.ZokernWarning)  # lr is not each method's
        warnings.filterwarnings("ignore", ".*neighbouring numbers", zokern.ZokernWarning)
        model = llama(dtype, dropout=0.2)
        trainer(model).train()
        again = llama(dtype, dropout=0.2)
        other = trainer(again)
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.zo_optimizer.counters["steps"] == 4
    assert other.zo_optimizer.placement == placement
    assert equal(weights(model), weights(again))
    base = llama(dtype, dropout=0.2)
    assert zokern.journal.replay(tmp_path / "journal.zkj", base) == 4
    assert equal(weights(base), weights(again))


def test_a_given_optimizer_and_what_is_logged(tmp_path: Path) -> None:
    model = llama()
    opt = zokern.HiZOO(model, lr=1e-3)
    trainer = ZOTrainer(model, arguments(tmp_path), train_dataset=rows(), optimizers=(opt, None))
    trainer.train()
    assert trainer.zo_optimizer is opt
    assert opt.counters["steps"] == 6
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["forwards"] for line in lines] == [6, 12, 18]
    assert all(math.isfinite(line["projected_gradient"]) for line in lines)
    assert lines[-1]["skipped_steps"] == lines[-1]["flat_steps"] == 0
    assert "grad_norm" not in lines[0]
    assert all(p.grad is None for p in model.parameters())


def test_groups_and_rates_come_from_the_arguments(tmp_path: Path) -> None:
    model = llama()
    trainer = ZOTrainer(model, arguments(tmp_path, weight_decay=0.1), train_dataset=rows())
    opt = trainer.create_optimizer()
    names = trainer.get_decay_parameter_names(model)
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in opt.param_groups] == [1e-2, 1e-2]
    assert len(opt.param_groups[0]["params"]) == len(names)
    assert opt.module is model
    assert type(opt) is zokern.MeZO
    assert not opt.maximize

    model = llama()
    for p in list(model.parameters())[:3]:
        p.requires_grad_(False)
    opt = ZOTrainer(model, arguments(tmp_path), train_dataset=rows(), zo="lezo").create_optimizer()
    (group,) = opt.param_groups  # without weight decay there is one
    assert [id(p) for p in group["params"]] == [id(p) for p in list(model.parameters())[3:]]
    assert opt.layers.num_dropped == 2  # three quarters of three blocks
    plain = torch.nn.Linear(2, 2, bias=False)
    opt = ZOTrainer(plain, arguments(tmp_path, weight_decay=0.1), train_dataset=rows()).create_optimizer()
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1]  # and none of nothing


def test_a_step_that_is_skipped_is_logged_and_does_not_hide_the_others_loss(tmp_path: Path) -> None:
    class Bad(ZOTrainer):
        def compute_loss(self, *args: Any, **named: Any) -> Any:
            return super().compute_loss(*args, **named) * (math.nan if self.state.global_step == 1 else 1.0)

    trainer = Bad(llama(), arguments(tmp_path), train_dataset=rows())
    with pytest.warns(zokern.ZokernWarning, match="not finite"):
        trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["skipped_steps"] for line in lines] == [1, 1, 1]
    assert all(2.5 < line["loss"] < 3.5 for line in lines)
    assert 2.5 < trainer.state.log_history[-1]["train_loss"] < 3.5


def test_the_trainers_own_features(tmp_path: Path) -> None:
    """Label smoothing, which takes labels out of a batch; evaluation, best model, early stopping, plateau; autocast."""
    model = llama()
    args = arguments(
        tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        label_smoothing_factor=0.1, lr_scheduler_type="reduce_lr_on_plateau", bf16=True, max_steps=8, learning_rate=3e-1,
        gradient_accumulation_steps=2, save_total_limit=2,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this step moves", zokern.ZokernWarning)
        trainer = ZOTrainer(
            model, args, train_dataset=rows(), eval_dataset=rows(8), callbacks=[EarlyStoppingCallback(1)],
            zo={"eps": 1e-2, "placement": "stream"},
        )  # fmt: skip
        trainer.train()
    evaluated = [(line["eval_loss"], line["step"]) for line in trainer.state.log_history if "eval_loss" in line]
    best = min(evaluated)
    assert trainer.state.best_global_step == best[1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best[0])
    base = llama()
    done = zokern.journal.replay(tmp_path / "journal.zkj", base)
    assert done == trainer.state.global_step  # it ends with the last weights,
    base = llama()
    zokern.journal.replay(tmp_path / "journal.zkj", base, until=best[1])  # and has a hash at each checkpoint
    assert equal(weights(base), weights(model))


def test_noise_of_neftune_is_the_same_in_all_forwards(tmp_path: Path) -> None:
    """It belongs to no module that draws; without pairing the difference of two losses is its."""
    losses: list[float] = []

    class Seen(ZOTrainer):
        def compute_loss(self, *args: Any, **named: Any) -> Any:
            loss = super().compute_loss(*args, **named)
            losses.append(float(loss))
            return loss

    args = arguments(tmp_path, neftune_noise_alpha=20.0, learning_rate=0.0, max_steps=2)
    trainer = Seen(llama(), args, train_dataset=rows(), zo={"eps": 1e-6, "placement": "shadow"})
    trainer.train()
    assert trainer.zo_optimizer.paired_randomness is True
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0] != pytest.approx(losses[2], abs=1e-4)


@pytest.mark.parametrize("dropout", [True, False])
def test_dropout_is_as_the_model_has_it_or_left_out(tmp_path: Path, dropout: bool) -> None:
    seen: list[tuple[bool, bool]] = []

    class Seen(ZOTrainer):
        def compute_loss(self, model: Any, *args: Any, **named: Any) -> Any:
            seen.append((model.training, model.model.layers[0].self_attn.training))
            return super().compute_loss(model, *args, **named)

    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = Seen(llama(dropout=0.1), args, train_dataset=rows(), eval_dataset=rows(2), dropout=dropout)
    trainer.train()
    assert [one for one in seen if one[0]] == [(True, dropout)] * 4


def test_what_a_forward_counts_is_counted_once(tmp_path: Path) -> None:
    class Counting(ZOTrainer):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            self.tokens, self._metrics, self.calls = 0, {"train": {"length": []}}, [0]

        def compute_loss(self, model: Any, inputs: Any, **named: Any) -> Any:
            self.tokens += inputs["input_ids"].numel()
            self.calls = [self.calls[0] + 1]
            self._metrics["train"]["length"].append(inputs["input_ids"].shape[1])
            return super().compute_loss(model, inputs, **named)

    args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=3)
    trainer = Counting(llama(), args, train_dataset=rows(), zo={"num_samples": 2})
    trainer.train()
    assert trainer.zo_optimizer.counters["forwards"] == 3 * 4 * 2
    assert trainer.tokens == 3 * 2 * 2 * 7
    assert trainer.calls == [3 * 4 * 2 + 2]  # two are of a trial (shares.py); only numbers and metrics are put back
    assert trainer._metrics["train"]["length"] == [7] * 6


def test_a_loss_function_of_the_users_own_and_training_twice(tmp_path: Path) -> None:
    def mean(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / (
            num_items_in_batch
        )

    function = counted(mean)
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=2)
    trainer = ZOTrainer(llama(), args, train_dataset=rows(), compute_loss_func=function)
    trainer.train()
    assert function.calls == 2 * 2 * 2 + 2  # whether it heeds num_items_in_batch was tried
    assert 2.5 < trainer.state.log_history[0]["loss"] < 3.5
    first = (tmp_path / "journal.zkj").read_bytes()
    trainer.train()
    assert trainer.zo_optimizer.counters["steps"] == 4
    assert (tmp_path / "journal.1.zkj").read_bytes() == first  # renamed, and not written over
    trainer.train()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["journal.1.zkj", "journal.2.zkj", "journal.zkj"]


@pytest.mark.parametrize("update", ["sgd", "adam"])
def test_a_checkpoint_of_the_model_alone(tmp_path: Path, update: str) -> None:
    """Directions are those of the run's steps; states begin anew, which is told. So does the journal."""

    def trainer(model: torch.nn.Module) -> ZOTrainer:
        args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4, save_only_model=True,
                         lr_scheduler_type="constant")  # fmt: skip
        return ZOTrainer(model, args, train_dataset=rows(), zo={"update": update, "eps": 1e-2})

    whole, again = llama(), llama()
    trainer(whole).train()
    other = trainer(again)
    at = str(tmp_path / "checkpoint-2")
    with pytest.warns(
        zokern.ZokernWarning, match="goes on at step 2, and its schedule and the method's states begin anew"
    ):
        other.train(resume_from_checkpoint=at)
    assert equal(weights(whole), weights(again)) == (update == "sgd")  # the schedule is constant
    assert other.zo_optimizer.counters["steps"] == 4
    header = zokern.journal.Reader(tmp_path / "journal.zkj").header
    assert header["first_step"] == 2
    base = llama()
    base.load_state_dict(again.from_pretrained(at).state_dict())
    assert zokern.journal.replay(tmp_path / "journal.zkj", base) == 4
    assert equal(weights(base), weights(again))


def test_method_and_settings_from_the_trainers_pair(tmp_path: Path) -> None:
    pair = (zokern.FZOO, {"candidates": 3})
    trainer = ZOTrainer(
        llama(), arguments(tmp_path, max_steps=1), train_dataset=rows(), optimizer_cls_and_kwargs=pair, journal=False
    )
    trainer.train()
    assert type(trainer.zo_optimizer) is zokern.FZOO
    assert trainer.zo_optimizer.counters["forwards"] == 4
    assert not (tmp_path / "journal.zkj").exists()


def test_a_compiled_model(tmp_path: Path) -> None:
    model = llama()
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=2)
    ZOTrainer(model, args, train_dataset=rows(), zo={"placement": "stream"}).train()
    plain = llama()
    ZOTrainer(plain, arguments(tmp_path, max_steps=2), train_dataset=rows(), zo={"placement": "stream"}).train()
    assert equal(weights(model), weights(plain))
