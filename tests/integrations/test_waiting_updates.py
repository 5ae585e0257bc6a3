"""Updates that wait (fold_every) in trainers: evaluation has them, a run ends with a fold, nothing is added twice."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import zokern
from tests.integrations.tiny import arguments, equal, llama, rows, weights, words
from zokern import journal
from zokern.journal import tools

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
from safetensors.torch import load_file
from transformers import TrainerCallback

from zokern.integrations.transformers import ForwardOnly, ZOTrainer
from zokern.integrations.trl import RewardTrainer

WAITS: dict[str, Any] = {"eps": 1e-1, "distribution": "lowrank:1", "placement": "forward", "fold_every": 4, "seed": 3}
AT_ONCE = {**WAITS, "fold_every": 1}
HALVES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    torch.set_num_threads(1)


def trainer(folder: Path, model: Any = None, zo: Any = WAITS, cls: Any = ZOTrainer, **given: Any) -> Any:
    own = {name: given.pop(name) for name in ("journal", "callbacks") if name in given}
    args = arguments(folder, **{"weight_decay": 0.1, "learning_rate": 0.1, **given})
    return cls(model or llama(), args, train_dataset=rows(), eval_dataset=rows(4), zo=zo, **own)


def losses(run: Any, name: str = "eval_loss") -> torch.Tensor:
    return torch.tensor([line[name] for line in run.state.log_history if name in line])


def close(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """To what the rounding of a loss is in a step: 1e-6 of it, by eps, times lr and z. A step moves weights by 0.05."""
    return all(torch.allclose(x, y, rtol=0, atol=2e-5) for x, y in zip(weights(a), weights(b), strict=True))


def played(folder: Path, model: torch.nn.Module) -> int:
    """How many folds by hand the journal has, whose replay ends with the model's weights."""
    base = llama(next(model.parameters()).dtype)
    assert journal.replay(folder / "journal.zkj", base).verified
    assert equal(weights(base), weights(model))
    return int(tools.summary(folder / "journal.zkj")["folds"])


def test_evaluation_has_what_waits_and_a_runs_end_folds(tmp_path: Path) -> None:
    """Within training, by hand afterwards, and at predictions; the weights are those of steps that do not wait."""
    waits, plain = trainer(tmp_path, eval_strategy="steps", eval_steps=1), trainer(
        tmp_path, zo=AT_ONCE, eval_strategy="steps", eval_steps=1, journal=False
    )  # fmt: skip
    waits.train()
    plain.train()
    assert waits.zo_optimizer.pending == 0
    assert waits.zo_optimizer.counters["passes"] == 2  # of 6 steps
    assert torch.allclose(losses(waits), losses(plain), rtol=0, atol=1e-5)
    assert (losses(plain).diff().abs() > 1e-3).all()  # else it would not show
    assert close(waits.model, plain.model)
    for run in (waits, plain):
        assert abs(run.evaluate()["eval_loss"] - float(losses(run)[-1])) < 1e-5
        assert abs(run.predict(rows(4)).metrics["test_loss"] - float(losses(run)[-1])) < 1e-5
    assert played(tmp_path, waits.model) == 1


def test_what_a_user_calls_and_writes_has_it_too(tmp_path: Path) -> None:
    """An evaluation loop and prediction steps of one's own, outside of super(); a callback with trainer.folded()."""
    seen: list[float] = []

    def loss(model: Any) -> float:
        with torch.no_grad():
            return float(model(**{name: value[None] for name, value in rows(1)[0].items()}).loss)

    class Own(ZOTrainer):
        def evaluation_loop(self, *args: Any, **named: Any) -> Any:
            out = super().evaluation_loop(*args, **named)
            seen.append(loss(self.model))
            return out

        def prediction_step(self, *args: Any, **named: Any) -> Any:
            seen.append(loss(self.model))
            return super().prediction_step(*args, **named)

        def compute_loss(self, model: Any, inputs: Any, **named: Any) -> Any:
            with self.folded():  # nothing, inside a step
                return super().compute_loss(model, inputs, **named)

    class Looks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 3:
                with run.folded():
                    seen.append(loss(model))
                run.prediction_step(model, {name: value[None] for name, value in rows(1)[0].items()}, True)

    run = trainer(
        tmp_path, cls=Own, callbacks=[Looks()], eval_strategy="steps", eval_steps=3, max_steps=3, journal=False
    )
    run.train()
    folded = loss(run.model)
    assert len(seen) == 4  # two by the callback, a batch of an evaluation, and its end
    assert all(abs(one - folded) < 1e-6 for one in seen)
    assert abs(loss(llama()) - folded) > 1e-3


def test_a_step_inside_an_evaluation_is_refused(tmp_path: Path) -> None:
    class Steps(TrainerCallback):
        def on_prediction_step(self, *_: Any, **__: Any) -> None:
            run.zo_optimizer.step(lambda: run.model(**{k: v[None] for k, v in rows(1)[0].items()}).loss)

    run = trainer(tmp_path, callbacks=[Steps()], eval_strategy="steps", eval_steps=3, max_steps=3, journal=False)
    with pytest.raises(RuntimeError, match="step was called inside a folded"):
        run.train()
    assert run.zo_optimizer.pending == 0  # a run that breaks off is folded too


class Seen(TrainerCallback):
    """How many steps wait after each step, and whether the weights are still those that training began with."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool]] = []

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.start = weights(model)

    def on_step_end(self, *_: Any, model: Any = None, optimizer: Any = None, **__: Any) -> None:
        self.seen.append((optimizer.optimizer.pending, equal(weights(model), self.start)))


@HALVES
@pytest.mark.parametrize("written", [True, False], ids=["journal", "without"])
def test_a_run_is_resumed_in_the_middle_of_a_window(tmp_path: Path, written: bool, dtype: torch.dtype) -> None:
    """From folded copies, which get nothing twice. The journal has a fold there, and is gone back to again and again."""
    given = {"save_strategy": "steps", "save_steps": 2, "journal": written}
    whole = trainer(tmp_path, llama(dtype), **given)
    whole.train()
    last, middle = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (6, 2))
    assert all(torch.equal(p, last[name]) for name, p in whole.model.named_parameters() if name in last)
    for step, folds in ((2, 2), (4, 2), (2, 2)):
        looks = Seen()
        again = trainer(tmp_path, llama(dtype), callbacks=[looks], **given)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        if step == 2:
            assert looks.seen == [(1, True), (0, False), (1, False), (2, False)]
            start = dict(zip((name for name, _ in again.model.named_parameters()), looks.start, strict=True))
            assert all(torch.equal(start[name], middle[name]) for name in start if name in middle)
        assert dtype == torch.bfloat16 or close(again.model, whole.model)
        if written:
            assert played(tmp_path, again.model) == folds
            for until in (2, 4, 6):
                assert journal.replay(tmp_path / "journal.zkj", llama(dtype), until=until).verified


@HALVES
def test_at_the_end_of_a_window_a_run_is_resumed_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = trainer(tmp_path, llama(dtype), save_strategy="steps", save_steps=4)
    whole.train()
    again = trainer(tmp_path, llama(dtype), save_strategy="steps", save_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert equal(weights(whole.model), weights(again.model))
    assert played(tmp_path, again.model) == 1


def test_a_journal_of_other_weights_is_refused(tmp_path: Path) -> None:
    """Folded copies of another run, and a new journal where the run's is gone."""
    run = trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    run.train()
    (tmp_path / "journal.zkj").unlink()
    other = trainer(tmp_path, zo={**WAITS, "eps": 2e-1}, max_steps=2, save_strategy="steps", save_steps=2)
    other.train()
    written = (tmp_path / "journal.zkj").read_bytes()
    again = trainer(tmp_path, max_steps=3)
    run.save_model(str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="2 steps that wait, and the weights are neither"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "journal.zkj").read_bytes() == written


def test_folded_copies_begin_a_journal_of_their_own(tmp_path: Path) -> None:
    trainer(tmp_path / "a", save_strategy="steps", save_steps=2, max_steps=2).train()
    again = trainer(tmp_path / "b", max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    base = llama()
    base.load_state_dict(load_file(tmp_path / "a" / "checkpoint-2" / "model.safetensors"), strict=False)
    assert journal.replay(tmp_path / "b" / "journal.zkj", base).verified
    assert equal(weights(base), weights(again.model))


def test_the_best_model_gets_nothing_added(tmp_path: Path) -> None:
    """Its weights, bit for bit; the journal ends with the weights that training had."""
    given = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run = trainer(tmp_path, max_steps=7, learning_rate=1.0, load_best_model_at_end=True, **given)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this step moves", zokern.ZokernWarning)
        run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name != "checkpoint-7"
    saved, last = (load_file(at / "model.safetensors") for at in (best, tmp_path / "checkpoint-7"))
    assert all(torch.equal(p, saved[name]) for name, p in run.model.named_parameters() if name in saved)
    base = llama()
    assert journal.replay(tmp_path / "journal.zkj", base).verified
    assert all(torch.equal(p, last[name]) for name, p in base.named_parameters() if name in last)
    assert run.zo_optimizer.fold() == 0


def test_rewards_are_of_the_weights_with_what_waits(tmp_path: Path) -> None:
    """And completions that are written between steps."""
    asked = [{"prompt": f"w{i % 7} w{i % 5}"} for i in range(8)]

    def low(completions: list[str], **_: Any) -> list[float]:
        return [1.0 - sum(int(w[1:]) for w in text.split()) / 15 / max(len(text.split()), 1) for text in completions]

    runs = []
    for zo in (WAITS, AT_ONCE):
        args = arguments(tmp_path, learning_rate=0.3, max_steps=3, eval_strategy="steps", eval_steps=1)
        generation = {"max_new_tokens": 5, "suppress_tokens": [0, 1, 2]}
        zo = {**zo, "method": "es", "num_directions": 4, "eps": 0.3}
        runs.append(
            RewardTrainer(
                llama(), low, args, asked, asked, words(), generation=generation, zo=zo, journal=False
            )
        )  # fmt: skip
        runs[-1].train()
    rewards = [losses(run, "eval_reward") for run in runs]
    assert torch.allclose(*rewards, rtol=0, atol=1e-6)
    assert rewards[0].unique().numel() == 3


def test_callbacks_that_write_completions_or_copy_weights(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    reference = llama()
    run = trainer(tmp_path, max_steps=3, journal=False)
    run.args.ref_model_sync_steps, run.args.ref_model_mixup_alpha = 3, 1.0
    run.add_callback(trl.trainer.callbacks.SyncRefModelCallback(reference, None))
    run.train()
    assert equal(weights(reference), weights(run.model))
    run.add_callback(trl.BEMACallback())
    with pytest.raises(NotImplementedError, match="fold_every is 4, and BEMACallback averages the weights"):
        run.train()


def test_evaluations_of_trainers_that_come_first(tmp_path: Path) -> None:
    """Whose own loop looks at the model after super()'s, and whose best model is loaded without super()."""
    from transformers import Trainer

    seen: list[float] = []

    class First(Trainer):
        def evaluation_loop(self, *args: Any, **named: Any) -> Any:
            out = super().evaluation_loop(*args, **named)
            seen.append(float(self.model.lm_head.weight.detach().sum()))
            return out

        def _load_best_model(self) -> None:
            with torch.no_grad():
                self.model.lm_head.weight.zero_()

    class Tuner(First, ForwardOnly):
        pass

    given = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    run = trainer(tmp_path, cls=Tuner, max_steps=3, load_best_model_at_end=True, **given)
    run.train()
    base = llama()
    assert journal.replay(tmp_path / "journal.zkj", base).verified
    assert seen == [float(base.lm_head.weight.detach().sum())]
    assert not run.model.lm_head.weight.any()
