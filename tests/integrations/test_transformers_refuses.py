"""What ZOTrainer cannot do is refused at construction, by name, and nothing has been written then."""

from __future__ import annotations

import inspect
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import zokern
from tests.integrations.tiny import arguments, equal, llama, rows, weights

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
from transformers import Trainer, TrainingArguments  # noqa: E402

from zokern.integrations.transformers import ForwardOnly, ZOTrainer  # noqa: E402


class Own(Trainer):
    """Somebody's trainer with a step of its own."""

    def training_step(self, *args: Any, **named: Any) -> Any:
        return super().training_step(*args, **named)


def test_the_order_of_bases_is_checked() -> None:
    class Right(Own, ZOTrainer):
        pass

    assert Right.training_step is not ForwardOnly.training_step
    for wrong in (ZOTrainer, ForwardOnly):
        name = wrong.__name__
        with pytest.raises(TypeError, match=rf"Own has a training_step of its own.*write class Tuner\(Own, {name}\)"):
            type("Tuner", (wrong, Own), {})


def test_a_trainer_in_front_takes_our_arguments(tmp_path: Path) -> None:
    class Narrow(Own):
        def __init__(self, model: Any, args: Any, train_dataset: Any) -> None:
            super().__init__(model, args, train_dataset=train_dataset)

    class Tuner(Narrow, ForwardOnly):
        journal = False

    trainer = Tuner(llama(), arguments(tmp_path, max_steps=1), rows(), zo="fzoo", dropout=False)
    trainer.train()
    assert type(trainer.zo_optimizer) is zokern.FZOO
    assert not trainer.dropout
    assert not (tmp_path / "journal.zkj").exists()
    names = list(inspect.signature(Tuner).parameters)
    assert names == ["self", "model", "args", "train_dataset", "zo", "journal", "dropout"] or names == [
        "model", "args", "train_dataset", "zo", "journal", "dropout"
    ]  # fmt: skip
    with pytest.raises(TypeError, match="unexpected keyword argument 'zoo'"):
        Tuner(llama(), arguments(tmp_path), rows(), zoo="fzoo")


def test_a_training_step_that_never_reaches_ours_is_told(tmp_path: Path) -> None:
    class Alone(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            return model(**self._prepare_inputs(inputs)).loss.detach()

    class Tuner(Alone, ForwardOnly):
        pass

    model = llama()
    with pytest.raises(RuntimeError, match="Tuner has a training_step that never reaches ForwardOnly's"):
        Tuner(model, arguments(tmp_path), train_dataset=rows()).train()
    assert equal(weights(model), weights(llama()))

    class Sometimes(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            if self.state.global_step == 0:
                return super().training_step(model, inputs, num_items_in_batch)
            return model(**self._prepare_inputs(inputs)).loss.detach()

    class Other(Sometimes, ForwardOnly):
        pass

    trainer = Other(model, arguments(tmp_path), train_dataset=rows())
    with pytest.raises(RuntimeError, match="Other has a training_step that never reaches"):
        trainer.train()
    assert trainer.zo_optimizer.counters["steps"] == 1


def test_what_carries_no_signal_is_refused_by_its_name_in_trl(tmp_path: Path) -> None:
    """Also with a constructor of one's own."""

    class GRPOTrainer(Trainer):
        pass

    class Tuner(GRPOTrainer, ForwardOnly):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)

    Tuner(llama(), arguments(tmp_path), train_dataset=rows())  # somebody's, of the same name
    GRPOTrainer.__module__ = "trl.trainer.grpo_trainer"
    with pytest.raises(TypeError, match="GRPOTrainer cannot be trained with forwards only"):
        Tuner(llama(), arguments(tmp_path), train_dataset=rows())


class Gpus(TrainingArguments):
    n_gpu = 2


def no_check(self: Any) -> None:
    """fp16 is checked by transformers against the machine's devices."""


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"optim": "adafactor"},
            ValueError,
            r"optim is 'adafactor'.*leave it out\. The method is MeZO, or .*zo=",
        ),
        ({"fp16": True}, NotImplementedError, "ZOTrainer: mixed precision 'fp16' has a GradScaler.*Take bf16"),
        ({"deepspeed": "ds.json"}, NotImplementedError, "ZOTrainer: zokern does not train under DeepSpeed"),
        ({"fsdp": "full_shard"}, NotImplementedError, "ZOTrainer: zokern does not train under FSDP"),
        ({"loss_type": "dft"}, ValueError, "loss_type='dft' weighs tokens by detached"),
        ({"loss_type": ["sigmoid", "dft"]}, ValueError, "loss_type='dft' weighs tokens by detached"),
        ({"cls": Gpus}, NotImplementedError, "to 2 GPUs in every forward.*CUDA_VISIBLE_DEVICES=0"),
    ],
)
def test_arguments(tmp_path: Path, given: dict[str, Any], error: type[Exception], message: str) -> None:
    args = arguments(tmp_path)
    args.__class__ = given.pop("cls", TrainingArguments)
    for name, value in given.items():
        setattr(args, name, value)
    with pytest.raises(error, match=message):
        ZOTrainer(llama(), args, train_dataset=rows())


def test_what_the_environment_has_chosen_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.Accelerator.mixed_precision", property(lambda self: "fp8"))
    with pytest.raises(NotImplementedError, match="mixed precision 'fp8' carries scales"):
        ZOTrainer(llama(), arguments(tmp_path), train_dataset=rows())


def test_arguments_that_the_trainer_makes_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(NotImplementedError, match="to 2 GPUs in every forward"):
        ZOTrainer(llama(), train_dataset=rows())


def test_a_model_that_is_loaded_in_shards() -> None:
    from zokern.integrations import refused

    model = llama()
    refused.sharded(model)
    model.lm_head.weight.__class__ = type("DTensor", (torch.nn.Parameter,), {})
    with pytest.raises(NotImplementedError, match="does not train under a model that is loaded in shards"):
        refused.sharded(model)


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_what_the_environment_has_chosen(engine: str) -> None:
    from types import SimpleNamespace

    from zokern.integrations import refused

    made = SimpleNamespace(distributed_type=engine, mixed_precision="no", scaler=None)
    with pytest.raises(NotImplementedError, match="does not train under"):
        refused.accelerator(made)
    made.distributed_type, made.mixed_precision = "NO", "fp16"
    with pytest.raises(NotImplementedError, match="GradScaler"):
        refused.accelerator(made)
    made.mixed_precision, made.scaler = "no", object()
    with pytest.raises(NotImplementedError, match="GradScaler"):
        refused.accelerator(made)
    made.scaler, made.parallelism_config = None, SimpleNamespace(tp_size=2)
    with pytest.raises(NotImplementedError, match="does not train under tensor parallelism"):
        refused.accelerator(made)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"zo": "mezzo"}, ValueError, "zo: there is no method 'mezzo'; is 'mezo' meant"),
        ({"zo": 3}, TypeError, "zo must be a method's name, or a mapping of its settings, .*; got int"),
        ({"zo": zokern.HiZOO}, TypeError, 'zo has the class HiZOO; give its name: zo="hizoo"'),
        ({"zo": {"method": zokern.ES}}, TypeError, "zo has the class ES; give its name: zo={'method': 'es', ...}"),
        ({"zo": {"method": "hizoo", "epsilon": 1}}, TypeError, "zo: HiZOO has no setting 'epsilon'; is 'eps' meant"),
        (
            {"zo": {"lr": 1e-3}},
            ValueError,
            r"zo has 'lr', which TrainingArguments\(learning_rate=\) says; leave it out",
        ),
        ({"zo": {"maximize": True}}, ValueError, "zo has 'maximize', which the trainer says itself; leave it out"),
        (
            {"zo": {"method": "fzoo", "qqq": 1}},
            TypeError,
            "no setting 'qqq'; it has (?!.*(weight_decay|module|maximize))",
        ),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {})}, TypeError, "has SGD, which is none of zokern's"),
        ({"zo": "es", "optimizer_cls_and_kwargs": (zokern.ES, {})}, ValueError, "both given; leave one out"),
    ],
)
def test_the_method(tmp_path: Path, given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ZOTrainer(llama(), arguments(tmp_path), train_dataset=rows(), **given)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("journal", "x.zkj", r"journal is 'x.zkj'; it must be True or False: True writes args.output_dir/journal.zkj"),
        ("journal", None, "journal is None; it must be True or False"),
        ("dropout", 0.1, r"dropout is 0.1; it must be True or False: .* the model's probability, False leaves it out"),
        ("dropout", 0, "dropout is 0; it must be True or False"),
    ],
)
def test_what_is_true_or_false(tmp_path: Path, name: str, value: Any, message: str) -> None:
    """By name, and as a class has it; also of a trainer that comes first and does not know our arguments."""
    from transformers import Seq2SeqTrainer

    from zokern.integrations.transformers import ForwardOnly

    args = arguments(tmp_path)
    with pytest.raises(TypeError, match=message):
        ZOTrainer(llama(), args, train_dataset=rows(), **{name: value})
    with pytest.raises(TypeError, match=message):
        type("Own", (ZOTrainer,), {name: value})(llama(), args, train_dataset=rows())
    with pytest.raises(TypeError, match=message):
        type("Mixed", (Seq2SeqTrainer, ForwardOnly), {})(llama(), args, train_dataset=rows(), **{name: value})


def test_a_frozen_model(tmp_path: Path) -> None:
    model = llama().requires_grad_(False)
    for decay in (0.0, 0.1):
        trainer = ZOTrainer(model, arguments(tmp_path, weight_decay=decay), train_dataset=rows())
        with pytest.raises(
            ValueError, match=f"none of its {len(list(model.parameters()))} tensors has requires_grad=True"
        ):
            trainer.train()


def test_optimizers(tmp_path: Path) -> None:
    model, args = llama(), arguments(tmp_path)

    def trainer(opt: Any, **more: Any) -> Any:
        return ZOTrainer(model, args, train_dataset=rows(), optimizers=(opt, None), **more)

    with pytest.raises(TypeError, match="optimizers has a SGD; give one of zokern's"):
        trainer(torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(ValueError, match="none of its parameters is one of model's"):
        trainer(zokern.MeZO(llama(), lr=1.0))
    with pytest.raises(ValueError, match="ES has maximize=True, and the trainer's loss is to fall"):
        trainer(zokern.ES(model, lr=1.0, maximize=True))
    with pytest.raises(ValueError, match="zo and optimizers are both given"):
        trainer(zokern.MeZO(model, lr=1.0), zo="mezo")
    with pytest.raises(RuntimeError, match=r"made by train\(\); call create_optimizer\(\)"):
        _ = ZOTrainer(model, args, train_dataset=rows()).zo_optimizer


def resumed(folder: Path, zo: Any, model: torch.nn.Module | None = None) -> None:
    args = arguments(folder, save_strategy="steps", save_steps=1, max_steps=2)
    ZOTrainer(model or llama(), args, train_dataset=rows(), zo=zo).train(
        resume_from_checkpoint=str(folder / "checkpoint-1") if (folder / "checkpoint-1").exists() else None
    )


def test_a_checkpoint_of_another_optimizer(tmp_path: Path) -> None:
    """The Trainer's own optimizer's is refused, and what the message says in its place is done."""
    from transformers import LlamaForCausalLM, Trainer

    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    Trainer(llama(), args, train_dataset=rows()).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    args.max_steps = 4
    way = r"from another optimizer, .* \(in the Trainer: from_pretrained\(checkpoint\), and no resume_from_checkpoint\)"
    with pytest.raises(ValueError, match=way):
        ZOTrainer(llama(), args, train_dataset=rows()).train(resume_from_checkpoint=checkpoint)
    trainer = ZOTrainer(LlamaForCausalLM.from_pretrained(checkpoint), args, train_dataset=rows())
    trainer.train()
    assert trainer.zo_optimizer.counters["steps"] == 4


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"method": "mezo", "num_samples": 4}, "num_samples is 1 in state_dict and 4 here"),
        ("fzoo", "state_dict is of MeZO, and this is FZOO"),
    ],
)
def test_a_run_goes_on_with_other_settings(tmp_path: Path, other: Any, says: str) -> None:
    from transformers import LlamaForCausalLM

    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    ZOTrainer(llama(), args, train_dataset=rows()).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    args.max_steps = 4
    with pytest.raises(ValueError, match=rf"{says}; .*from_pretrained\(checkpoint\), and no resume_from_checkpoint"):
        ZOTrainer(llama(), args, train_dataset=rows(), zo=other).train(resume_from_checkpoint=checkpoint)
    trainer = ZOTrainer(LlamaForCausalLM.from_pretrained(checkpoint), args, train_dataset=rows(), zo=other)
    trainer.train()
    assert trainer.zo_optimizer.counters["steps"] == 4


def test_the_newest_checkpoint_is_of_an_earlier_run(tmp_path: Path) -> None:
    """Two runs in one folder, the first was longer. What goes on: a checkpoint that the journal reaches, or no journal."""

    def train(end: int, start: Any = None, **more: Any) -> Any:
        args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=end)
        trainer = ZOTrainer(llama(), args, train_dataset=rows(), **more)
        trainer.train(resume_from_checkpoint=start)
        return trainer

    train(6)
    train(4)
    assert (tmp_path / "journal.1.zkj").exists()
    with pytest.raises(zokern.journal.JournalError, match=r"ends after 4 steps: .* Under the Trainer resume_from"):
        train(8, start=True)
    assert train(8, start=True, journal=False).zo_optimizer.counters["steps"] == 8
    assert train(8, start=str(tmp_path / "checkpoint-4")).zo_optimizer.counters["steps"] == 8
    (tmp_path / "journal.zkj.cut").unlink()  # what the journal had after the checkpoint; nothing reads it
    assert zokern.journal.replay(tmp_path / "journal.zkj", llama()) == 8


def test_a_journal_that_is_gone_or_of_another_run(tmp_path: Path) -> None:
    """A run without states begins another one at its checkpoint; with states it is told; another run's is refused."""
    plain = tmp_path / "plain"
    resumed(plain, "mezo")
    journal = plain / "journal.zkj"
    kept = journal.read_bytes()
    journal.unlink()
    resumed(plain, "mezo")
    assert zokern.journal.Reader(journal).header["first_step"] == 1

    journal.write_bytes(kept)
    saved = plain / "checkpoint-1" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    changed = {name: t + 1 for name, t in load_file(saved).items()}
    save_file(changed, saved, metadata={"format": "pt"})
    with pytest.raises(zokern.journal.JournalError, match="weights are not those that the run had after 1 steps"):
        resumed(plain, "mezo")
    assert journal.read_bytes() == kept

    adam = tmp_path / "adam"
    zo = {"update": "adam"}
    resumed(adam, zo)
    shutil.copy(journal, adam / "journal.zkj")
    with pytest.raises(zokern.journal.JournalError, match="make them agree"):
        resumed(adam, zo)
    os.unlink(adam / "journal.zkj")
    with pytest.warns(zokern.ZokernWarning, match="cannot begin at step 1 of a run with states.*none is written"):
        resumed(adam, zo)
