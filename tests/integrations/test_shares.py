"""Accumulation makes no step longer, also where a model leaves num_items_in_batch alone."""

from __future__ import annotations

import contextlib
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zokern
from tests.integrations.tiny import arguments, llama, rows
from zokern import ZokernWarning
from zokern.optim import pairing

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
from transformers import BertConfig, BertForSequenceClassification

from zokern.integrations.transformers import ZOTrainer


def classifier(dropout: float = 0.0) -> Any:
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(config)


def labelled() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(40, (6,), generator=draw), "labels": i % 2} for i in range(8)]


def logged(trainer: ZOTrainer) -> tuple[float, float]:
    trainer.train()
    line = trainer.state.log_history[0]
    return line["loss"], line["projected_gradient"]


def of(folder: Path, accumulated: int, kind: type[ZOTrainer] = ZOTrainer, **options: Any) -> ZOTrainer:
    args = arguments(
        folder, max_steps=1, logging_steps=1, per_device_train_batch_size=8 // accumulated,
        gradient_accumulation_steps=accumulated, learning_rate=0.0,
    )  # fmt: skip
    return kind(classifier(), args, train_dataset=labelled(), **options)


def test_a_classifier_has_one_loss_however_its_batch_is_cut(tmp_path: Path) -> None:
    """Its loss is a mean, with or without a count. No forward of the step is one more."""
    whole = logged(of(tmp_path, 1))
    for accumulated in (2, 8):
        trainer = of(tmp_path, accumulated)
        assert logged(trainer) == pytest.approx(whole, rel=1e-3)
        assert trainer.zo_optimizer.counters["forwards"] == 2 * accumulated


def test_a_language_models_shares_are_added(tmp_path: Path) -> None:
    losses = []
    for accumulated in (1, 4):
        args = arguments(
            tmp_path, max_steps=1, logging_steps=1, per_device_train_batch_size=4 // accumulated,
            gradient_accumulation_steps=accumulated, learning_rate=0.0,
        )  # fmt: skip
        losses.append(logged(ZOTrainer(llama(), args, train_dataset=rows())))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


class Own(ZOTrainer):
    """As people write it: a mean of its own, and the count is left alone."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        return torch.nn.functional.cross_entropy(model(input_ids=inputs["input_ids"]).logits, labels)


def function(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return torch.nn.functional.cross_entropy(outputs.logits, labels)


@pytest.mark.parametrize("kind", [Own, ZOTrainer])
def test_a_loss_of_the_users_own_is_asked_about(tmp_path: Path, kind: type[ZOTrainer]) -> None:
    """It may have been divided already. Both answers that the warning names are taken."""
    options: Any = {} if kind is Own else {"compute_loss_func": function}
    whole = logged(of(tmp_path, 1, kind, **options))
    for answer, times in ((None, 4), (False, 1), (True, 4)):
        trainer = of(tmp_path, 4, kind, **options)
        if answer is not None:
            trainer.loss_is_scaled_for_ga = answer
        with pytest.warns(ZokernWarning, match="4 micro-batches") if answer is None else contextlib.nullcontext():
            found = logged(trainer)
        assert found == pytest.approx([times * one for one in whole], rel=1e-3)


def test_the_trial_leaves_nothing_behind(tmp_path: Path) -> None:
    """Modes, numbers and metrics that compute_loss keeps are as without it; dropout draws the same."""

    class Counting(ZOTrainer):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            self.calls, self._metrics = 0, {"train": {"length": []}, "eval": {}}

        def compute_loss(self, model: Any, inputs: Any, **named: Any) -> Any:
            self.calls += 1
            self._metrics["train" if model.training else "eval"].setdefault("length", []).append(
                inputs["labels"].shape[0]
            )
            return super().compute_loss(model, inputs, **named)

    Counting.compute_loss.__module__ = "trl.trainer"  # of which it is known that nothing else divides
    seen = []
    for said in (None, False):
        trainer = Counting(classifier(0.1), of(tmp_path, 4).args, train_dataset=labelled())
        trainer.model.bert.pooler.eval()
        trainer.loss_is_scaled_for_ga = said
        torch.manual_seed(3)
        trainer.train()
        seen.append((trainer.calls, trainer._metrics, trainer.state.log_history[0]["projected_gradient"]))
        assert trainer.model.training
    assert seen[0] == seen[1] == (4, {"train": {"length": [2] * 4}, "eval": {}}, seen[0][2])


def test_a_loss_that_is_no_number_decides_nothing(tmp_path: Path) -> None:
    """It is tried again with the next step."""

    class Late(ZOTrainer):
        def compute_loss(self, *given: Any, **named: Any) -> Any:
            return super().compute_loss(*given, **named) * (1.0 if self.state.global_step else float("nan"))

    Late.compute_loss.__module__ = "trl.trainer"
    args = of(tmp_path, 4).args
    args.max_steps = 2
    trainer = Late(classifier(), args, train_dataset=labelled())
    with pytest.warns(ZokernWarning, match="finite"):
        trainer.train()
    assert trainer.zo_optimizer.skipped_steps == 1
    assert 0.4 < trainer.state.log_history[1]["loss"] < 1.0


# ------------------------------------------------------------------------------------- what else a classifier's user meets


def in_float32(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """As docs/trainer.md has it."""
    total = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def in_16_bits(folder: Path, function: Any = None, **given: Any) -> ZOTrainer:
    args = arguments(folder, max_steps=2, logging_steps=1, learning_rate=0.0, **given)
    model = classifier().to(torch.bfloat16)
    return ZOTrainer(model, args, train_dataset=labelled(), compute_loss_func=function)


@pytest.mark.filterwarnings("ignore:.*all its probes:zokern.ZokernWarning")
def test_what_the_warning_of_16_bit_losses_says_helps(tmp_path: Path) -> None:
    with pytest.warns(ZokernWarning, match=r"With a Trainer: compute_loss_func= with such a loss, or bf16=True"):
        in_16_bits(tmp_path).train()
    for trainer in (in_16_bits(tmp_path, in_float32), in_16_bits(tmp_path, bf16=True)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", ZokernWarning)
            trainer.train()
        assert trainer.zo_optimizer.flat_steps == 0
        assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}


def test_a_16_bit_classifier_accumulates_with_a_loss_of_its_own_and_without(tmp_path: Path) -> None:
    """transformers' own loss is a mean of each micro-batch, and the Trainer takes it for a share (its issue 47688)."""

    def first(function: Any = None, **given: Any) -> float:
        return logged(in_16_bits(tmp_path, function, bf16=True, **given))[0]

    whole = first(per_device_train_batch_size=8)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert first(in_float32, **parts) == pytest.approx(whole, abs=0.05)
    assert first(**parts) == pytest.approx(whole, abs=0.05)


def test_settings_without_effect_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments(tmp_path, max_steps=1, max_grad_norm=0.5, adam_beta1=0.8, gradient_checkpointing=True)
    ZOTrainer(classifier(), args, train_dataset=labelled()).train()
    told = "max_grad_norm=0.5, (activation_checkpointing or )?gradient_checkpointing=True, adam_beta1=0.8"
    lines = capsys.readouterr().err.splitlines()
    assert any(re.fullmatch(f"zokern: without effect, as there are no gradients: {told}", line) for line in lines)
    both = "activation_checkpointing or gradient_checkpointing=True"  # whichever was set
    assert hasattr(args, "activation_checkpointing") == any(both in line for line in lines)
    ZOTrainer(classifier(), arguments(tmp_path, max_steps=1, max_grad_norm=0.0), train_dataset=labelled()).train()
    assert "without effect" not in capsys.readouterr().err


def test_an_lr_far_from_the_rules_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Adam's is; the one that the note names is not, nor is any where the rule does not apply."""

    def said(lr: float, model: Any = None, zo: Any = None) -> list[str]:
        args = arguments(tmp_path, max_steps=1, learning_rate=lr)
        model = model or classifier()
        ZOTrainer(model, args, train_dataset=labelled(), zo=zo).train()
        return re.findall(
            r"zokern: lr \S+ is \S+ times (?:smaller than )?(\S+), which the rule of thumb", capsys.readouterr().err
        )

    for n in (1, 4):
        zo = {"method": "mezo", "num_samples": n}
        (ruled,) = said(1e-6, zo=zo)
        assert float(ruled) == pytest.approx(0.04 * n / classifier().num_parameters() ** 0.4, rel=0.05)
        assert said(float(ruled), zo=zo) == []
    frozen = classifier()
    frozen.classifier.weight.requires_grad_(False)
    assert said(1e-6, frozen) == said(1e-6, zo={"method": "hizoo"}) == said(0.0) == []
    own = zokern.MeZO(model := classifier(), lr=1e-6)
    ZOTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=labelled(), optimizers=(own, None)).train()
    assert "the rule" not in capsys.readouterr().err


def test_the_log_counts_steps_that_are_too_large(tmp_path: Path) -> None:
    trainer = of(tmp_path, 1)
    trainer.args.learning_rate, trainer.args.max_steps = 10.0, 2
    with pytest.warns(ZokernWarning, match="Further such steps are only counted: see large_steps"):
        trainer.train()
    assert trainer.state.log_history[1]["large_steps"] == trainer.zo_optimizer.large_steps == 2


def test_the_note_on_dropout_names_what_a_trainer_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairing._announced.discard("paired")
    for dropout in (True, False):
        ZOTrainer(classifier(0.1), arguments(tmp_path, max_steps=1), train_dataset=labelled(), dropout=dropout).train()
        told = (
            "zokern: all is well: what a Dropout draws is the same in all forwards of a step. The papers train without "
            "dropout: by model.eval(), under a Trainer dropout=False"
        )
        assert (told in capsys.readouterr().err.splitlines()) == dropout
        pairing._announced.discard("paired")
