"""Runs that are unlike the usual: broken off, begun twice, from half a checkpoint, on data that ends anywhere."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zokern
from tests.integrations.tiny import arguments, counted, equal, llama, rows, weights

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback  # noqa: E402

from zokern import ZokernWarning  # noqa: E402
from zokern.integrations.transformers import ForwardOnly, ZOTrainer  # noqa: E402
from zokern.optim import pairing  # noqa: E402

ADAM = {"update": "adam", "eps": 1e-2}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    torch.set_num_threads(1)


def replayed(folder: Path, model: torch.nn.Module) -> int:
    """How many steps the journal makes again, which end with the model's weights."""
    base = llama()
    done = zokern.journal.replay(folder / "journal.zkj", base)
    assert equal(weights(base), weights(model))
    return int(done)


class Failing(ZOTrainer):
    """Raises in a forward: `at` is the global step, `limit` the largest batch there is room for."""

    at: int | None = None
    error: BaseException = KeyboardInterrupt()
    limit = 99

    def compute_loss(self, model: Any, inputs: Any, **named: Any) -> Any:
        if self.state.global_step == self.at and len(inputs["input_ids"]) > self.limit:
            raise self.error
        return super().compute_loss(model, inputs, **named)


@pytest.mark.parametrize("placement", ["inplace", "stream"])
def test_a_run_with_states_that_was_broken_off_goes_on_in_its_journal(tmp_path: Path, placement: str) -> None:
    args = arguments(tmp_path, max_steps=4, gradient_accumulation_steps=2, logging_steps=2)
    trainer = Failing(llama(), args, train_dataset=rows(), zo={**ADAM, "placement": placement})
    trainer.at, trainer.limit = 3, 0
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer._micro == []
    trainer.at = None
    trainer.train()
    assert trainer.zo_optimizer.counters["steps"] == 3 + 4
    assert replayed(tmp_path, trainer.model) == 7
    assert os.listdir(tmp_path) == ["journal.zkj"]
    trainer.train()  # a third time, after an end that was none
    assert replayed(tmp_path, trainer.model) == 11


@pytest.mark.parametrize("at", [0, 1])
def test_a_smaller_batch_is_found_and_the_journal_has_it_all(tmp_path: Path, at: int) -> None:
    args = arguments(tmp_path, max_steps=3, per_device_train_batch_size=8, auto_find_batch_size=True)
    trainer = Failing(llama(), args, train_dataset=rows(), zo=ADAM)
    trainer.at, trainer.limit, trainer.error = at, 7, RuntimeError("CUDA out of memory.")
    trainer.train()
    assert trainer._train_batch_size < 8
    assert replayed(tmp_path, trainer.model) == 3 + at
    assert os.listdir(tmp_path) == ["journal.zkj"]


@pytest.mark.parametrize("journal", [True, False])
def test_a_resumed_run_finds_a_smaller_batch(tmp_path: Path, journal: bool) -> None:
    """After a step too: the run goes on from the checkpoint again, weights and states."""

    def trainer(batch: int) -> Failing:
        args = arguments(
            tmp_path, max_steps=4, auto_find_batch_size=True, save_strategy="steps", save_steps=2,
            per_device_train_batch_size=batch,
        )  # fmt: skip
        return Failing(llama(), args, train_dataset=rows(), zo={**ADAM, "placement": "inplace"}, journal=journal)

    trainer(2).train()
    state = tmp_path / "checkpoint-2" / "trainer_state.json"

    def with_batches_of(old: int, new: int) -> None:
        text = state.read_text()
        assert f'"train_batch_size": {old}' in text
        state.write_text(text.replace(f'"train_batch_size": {old}', f'"train_batch_size": {new}'))

    with_batches_of(2, 3)
    again = trainer(2)
    again.at, again.limit, again.error = 3, 2, RuntimeError("CUDA out of memory.")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again._train_batch_size < 3
    assert again.zo_optimizer.counters["steps"] == 4
    if journal:
        assert replayed(tmp_path, again.model) == 4
        assert zokern.journal.replay(tmp_path / "journal.zkj", llama(), until=2).verified
        return
    with_batches_of(3, again._train_batch_size)
    straight = trainer(2)
    straight.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(weights(again.model), weights(straight.model))


def test_nothing_of_one_training_is_told_of_the_next(tmp_path: Path) -> None:
    class Scaled(ZOTrainer):
        scale = 1.0

        def compute_loss(self, *args: Any, **named: Any) -> Any:
            return super().compute_loss(*args, **named) * self.scale

    trainer = Scaled(llama(), arguments(tmp_path, max_steps=3, learning_rate=1e-6), train_dataset=rows())
    trainer.train()
    trainer.scale = 10.0
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    assert 25 < line["loss"] < 35
    trainer.scale = float("nan")
    with pytest.warns(zokern.ZokernWarning, match="not finite"):
        trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] == 0.0  # as the Trainer has it, and not the last run's


def test_a_line_of_the_log_is_of_its_own_steps(tmp_path: Path) -> None:
    class Growing(ZOTrainer):
        def compute_loss(self, *args: Any, **named: Any) -> Any:
            return super().compute_loss(*args, **named) * 10**self.state.global_step

    args = arguments(tmp_path, max_steps=3, learning_rate=0.0, logging_steps=1)
    trainer = Growing(llama(), args, train_dataset=rows())
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert [25 < loss / 10**i < 35 for i, loss in enumerate(losses, start=-1)] == [True] * 3


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("said", ["by attribute", "by function", "by neither"])
def test_losses_that_are_shares_are_added_and_means_are_averaged(tmp_path: Path, said: str, share: bool) -> None:
    """As the Trainer has it: what a class says of its compute_loss; a loss function; a model that takes a count."""

    class Own(ZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, **named: Any) -> Any:
            return super().compute_loss(model, inputs) / (3 if share else 1)

    class Said(Own):
        loss_is_scaled_for_ga = share

    def function(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        total: Tensor = torch.nn.functional.cross_entropy(
            outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum"
        )
        return total / num_items_in_batch

    args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=3, logging_steps=1, learning_rate=0.0)
    if said == "by attribute":
        trainer: ZOTrainer = Said(llama(), args, train_dataset=rows())
    elif said == "by function":
        trainer = ZOTrainer(llama(), args, train_dataset=rows(), compute_loss_func=function)
        trainer.model_accepts_loss_kwargs = False
    else:
        trainer = Own(llama(), args, train_dataset=rows())
        trainer.model_accepts_loss_kwargs = share
    asked = share and said == "by neither"  # who divides by himself should say so
    with pytest.warns(ZokernWarning, match="set it to True") if asked else contextlib.nullcontext():
        trainer.train()
    loss = trainer.state.log_history[0]["loss"]
    assert 2.5 < loss < 3.5


def test_a_count_that_is_not_there(tmp_path: Path) -> None:
    """Rows without "labels" have no count, and a loss of their own is a mean."""

    class Own(ZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any = None, **_: Any) -> Any:
            assert num_items_in_batch is None
            return model(labels=inputs["input_ids"], **inputs).loss

    data = [{"input_ids": row["input_ids"]} for row in rows()]
    args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=3, logging_steps=1, learning_rate=0.0)
    trainer = Own(llama(), args, train_dataset=data)
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    assert 2.5 < trainer.state.log_history[0]["loss"] < 3.5


def test_a_checkpoint_without_an_optimizer(tmp_path: Path) -> None:
    """Its run goes on at its step, so that no direction comes twice, in a journal of its own."""

    def trainer() -> ZOTrainer:
        args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, save_only_model=True)
        return ZOTrainer(llama(), args, train_dataset=rows(), zo=ADAM)

    trainer().train()
    first = (tmp_path / "journal.zkj").read_bytes()
    again = trainer()
    with pytest.warns(zokern.ZokernWarning, match=r"no optimizer \(save_only_model\): the run goes on at step 2"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.zo_optimizer.counters["steps"] == 4
    assert (tmp_path / "journal.1.zkj").read_bytes() == first
    assert zokern.journal.Reader(tmp_path / "journal.zkj").header["first_step"] == 2
    base = llama()
    zokern.journal.replay(tmp_path / "journal.1.zkj", base, until=2)
    assert zokern.journal.replay(tmp_path / "journal.zkj", base) == 4
    assert equal(weights(base), weights(again.model))


def test_resumed_again_and_again_every_checkpoint_can_be_replayed(tmp_path: Path) -> None:
    """From the last checkpoint but one, then from the first one twice; with a callback that changes lr."""

    class Halving(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            optimizer.param_groups[0]["lr"] *= 0.5

    def trainer() -> ZOTrainer:
        args = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
        return ZOTrainer(llama(), args, train_dataset=rows(), zo={"update": "momentum"}, callbacks=[Halving()])

    whole = trainer()
    whole.train()
    for step in (2, 1, 1):
        again = trainer()
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert equal(weights(whole.model), weights(again.model))
        for until in (1, 2, 3):
            assert zokern.journal.replay(tmp_path / "journal.zkj", llama(), until=until).verified
    assert replayed(tmp_path, whole.model) == 3
    again._load_from_checkpoint = counted(again._load_from_checkpoint)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again._load_from_checkpoint.calls == 1  # the weights are loaded again for a second attempt only
    assert equal(weights(whole.model), weights(again.model))


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(rows(10))


def test_data_that_ends_within_a_step_is_told(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=3, gradient_accumulation_steps=3)
    trainer = ZOTrainer(llama(), args, train_dataset=Stream())
    with pytest.warns(zokern.ZokernWarning) as told:
        trainer.train()
    assert [str(one.message)[:40] for one in told if one.category is zokern.ZokernWarning] == [
        "2 micro-batches at the end of an epoch a"
    ]
    assert trainer.zo_optimizer.counters["forwards"] == 3 * 3 * 2


@pytest.mark.parametrize("what", ["should_epoch_stop", "should_training_stop"])
def test_an_epoch_that_a_callback_ends_within_a_step(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, what: str
) -> None:
    class Stops(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            setattr(control, what, state.global_step == 1)

    args = arguments(tmp_path, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
    trainer = ZOTrainer(llama(), args, train_dataset=rows(), callbacks=[Stops()])
    trainer.train()
    assert trainer.zo_optimizer.counters == {**trainer.zo_optimizer.counters, "steps": 1, "forwards": 4}
    assert not [one for one in recwarn if one.category is zokern.ZokernWarning]


def test_a_run_without_its_journal_saves_and_goes_on(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = ZOTrainer(llama(), args, train_dataset=rows(), zo=ADAM)
    trainer.train()
    os.unlink(tmp_path / "journal.zkj")
    with pytest.warns(zokern.ZokernWarning, match="cannot begin at step 2 of a run with states: none is written"):
        trainer.train()
    assert trainer.zo_optimizer.counters["steps"] == 4
    assert not (tmp_path / "journal.zkj").exists()


def test_a_search_writes_no_journal(tmp_path: Path) -> None:
    class Search(TrainerCallback):  # as the Trainer says it of a search's trial
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            state.is_hyper_param_search = True

    args = arguments(tmp_path, max_steps=1)
    trainer = ZOTrainer(None, args, train_dataset=rows(), model_init=lambda: llama(), callbacks=[Search()])
    trainer.train()
    assert trainer.zo_optimizer.counters["steps"] == 1
    assert os.listdir(tmp_path) == []


def test_noise_of_neftune_is_paired_unless_it_is_said_that_it_is_not(tmp_path: Path) -> None:
    args = arguments(tmp_path, neftune_noise_alpha=1.0, max_steps=1)
    trainer = ZOTrainer(llama(), args, train_dataset=rows(), zo={"paired_randomness": False})
    trainer.train()
    assert trainer.zo_optimizer.paired_randomness is False


SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 32}
SMALLER = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
DROPPING = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SHAPE)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SHAPE)),
    "electra": lambda: transformers.ElectraForSequenceClassification(
        transformers.ElectraConfig(**SHAPE, embedding_size=16)
    ),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(vocab_size=32, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALLER)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, attention_dropout=0.1)),
}


@pytest.mark.parametrize("family", DROPPING)
def test_without_dropout_nothing_draws_and_with_it_forwards_draw_the_same(tmp_path: Path, family: str) -> None:
    """Attention may take the share of its own dropout without calling it, as BERT's and GPT-2's do."""
    model, ids = DROPPING[family](), torch.randint(3, 30, (2, 8))
    trainer = ZOTrainer(model, arguments(tmp_path), train_dataset=rows(), dropout=False)
    trainer.set_mode(model)
    before = torch.get_rng_state()
    model(input_ids=ids)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(map(pairing.draws, model.modules()))
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()  # as somebody may do by hand
    model(input_ids=ids)
    drew = not torch.equal(torch.get_rng_state(), before)
    assert any(map(pairing.draws, model.modules())) or not drew


def test_dropout_stays_left_out_when_a_callback_sets_the_mode(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Sets(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            model.train()

    class Seen(ZOTrainer):
        def compute_loss(self, model: Any, *args: Any, **named: Any) -> Any:
            seen.append(model.model.layers[0].self_attn.training)
            return super().compute_loss(model, *args, **named)

    args = arguments(tmp_path, max_steps=2)
    Seen(llama(dropout=0.1), args, train_dataset=rows(), dropout=False, callbacks=[Sets()]).train()
    assert seen == [False] * 4


def test_the_devices_cache_is_emptied_as_often_as_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clear = counted(lambda: None)
    monkeypatch.setattr("zokern.integrations.transformers.clear_device_cache", clear)
    args = arguments(tmp_path, max_steps=3, torch_empty_cache_steps=2, gradient_accumulation_steps=2)
    ZOTrainer(llama(), args, train_dataset=rows()).train()
    assert clear.calls == 2


def test_a_callback_that_raises_before_the_loops_own_step(tmp_path: Path) -> None:
    class Raises(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            raise ValueError("mine")

    trainer = ZOTrainer(llama(), arguments(tmp_path), train_dataset=rows(), callbacks=[Raises()])
    with pytest.raises(ValueError, match="mine"):
        trainer.train()
    with pytest.raises(TypeError, match="step needs a closure"):
        trainer.zo_optimizer.step()


def test_micro_batches_of_a_step_that_was_never_made_are_given_up(tmp_path: Path) -> None:
    class Raises(TrainerCallback):
        def on_substep_end(self, *_: Any, **__: Any) -> None:
            raise ValueError("mine")

    args = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = ZOTrainer(llama(), args, train_dataset=rows(), callbacks=[Raises()])
    with pytest.raises(ValueError, match="mine"):
        trainer.train()
    assert trainer._micro == []


def test_a_loss_is_computed_in_the_trainers_context(tmp_path: Path) -> None:
    entered = counted(lambda: None)

    class Own(ZOTrainer):
        def compute_loss_context_manager(self) -> Any:
            entered()
            return super().compute_loss_context_manager()

    args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=3)
    Own(llama(), args, train_dataset=rows()).train()
    assert entered.calls == 2 * 3 + 1  # a trial (shares.py)


def test_an_optimizer_that_another_trainer_makes(tmp_path: Path) -> None:
    class Plus(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
            return self.optimizer

    class Tuner(Plus, ForwardOnly):
        pass

    trainer = Tuner(llama(), arguments(tmp_path), train_dataset=rows())
    with pytest.raises(TypeError, match=r"Tuner: the optimizer is a AdamW, which Plus\.create_optimizer has made"):
        trainer.train()


def test_an_encoder_decoder_that_generates_at_evaluation(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    class ZOSeq2SeqTrainer(Seq2SeqTrainer, ForwardOnly):
        zo = "fzoo"

    def trainer() -> Any:
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=19, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
                dropout_rate=0.1,
            )
        )  # fmt: skip
        usual = arguments(tmp_path).to_dict()
        given = {name: usual[name] for name in ("report_to", "use_cpu", "disable_tqdm", "data_seed")}
        args = Seq2SeqTrainingArguments(
            str(tmp_path), max_steps=2, predict_with_generate=True, generation_max_length=5, eval_strategy="steps",
            eval_steps=1, save_strategy="steps", save_steps=1, learning_rate=1e-4, **given,
        )  # fmt: skip
        return ZOSeq2SeqTrainer(
            model, args, train_dataset=rows(), eval_dataset=rows(2),
            compute_metrics=lambda out: {"length": out.predictions.shape[1]},
        )  # fmt: skip

    whole, again = trainer(), trainer()
    whole.train()
    assert whole.state.log_history[0]["eval_length"] >= 5
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert equal(weights(whole.model), weights(again.model))
