"""Updates that wait (fold_every) in trainers: evaluation has them, and a run ends with a fold."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import zokern
from tests.integrations.tiny import arguments, equal, llama, rows, weights, words
from zokern import journal

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
from transformers import TrainerCallback

from tests.integrations.waits import WAITS, close, losses, played, trainer
from zokern.integrations.shown import READERS
from zokern.integrations.transformers import ForwardOnly, ZOTrainer
from zokern.integrations.trl import RewardTrainer

AT_ONCE = {**WAITS, "fold_every": 1}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    torch.set_num_threads(1)


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
                assert run.zo_optimizer.pending == 3
                run.prediction_step(model, {name: value[None] for name, value in rows(1)[0].items()}, True)

        def on_train_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            seen.append(loss(model))
            assert run.zo_optimizer.pending == 0

    run = trainer(
        tmp_path, cls=Own, callbacks=[Looks()], eval_strategy="steps", eval_steps=3, max_steps=3, journal=False
    )
    run.train()
    folded = loss(run.model)
    assert len(seen) == 5  # three by the callback, a batch of an evaluation, and its end
    assert all(abs(one - folded) < 1e-6 for one in seen)
    assert abs(loss(llama()) - folded) > 1e-3


def test_weights_that_an_evaluation_casts_are_folded_first(tmp_path: Path) -> None:
    model = llama()
    opt = zokern.MeZO(model, lr=0.1, **WAITS)
    opt.step(lambda: model(**{name: value[None] for name, value in rows(1)[0].items()}).loss)
    folded = {name: value.bfloat16() for name, value in model.state_dict().items()}
    run = ZOTrainer(model, arguments(tmp_path, bf16_full_eval=True), eval_dataset=rows(4), optimizers=(opt, None))
    run.evaluate()
    assert all(torch.equal(p, folded[name]) for name, p in model.named_parameters())
    assert opt.pending == 0


def test_a_step_inside_an_evaluation_is_refused(tmp_path: Path) -> None:
    class Steps(TrainerCallback):
        def on_prediction_step(self, *_: Any, **__: Any) -> None:
            run.zo_optimizer.step(lambda: run.model(**{k: v[None] for k, v in rows(1)[0].items()}).loss)

    run = trainer(tmp_path, callbacks=[Steps()], eval_strategy="steps", eval_steps=3, max_steps=3, journal=False)
    with pytest.raises(RuntimeError, match="step was called inside a folded"):
        run.train()
    assert run.zo_optimizer.pending == 0  # a run that breaks off is folded too


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
    for name, event in READERS.items():
        assert event in vars(getattr(trl.trainer.callbacks, name))
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


def test_with_fold_every_0_a_runs_end_folds_nothing(tmp_path: Path) -> None:
    never = trainer(tmp_path / "never", zo={**WAITS, "fold_every": 0}, max_steps=3)
    before = weights(never.model)
    never.train()
    assert never.zo_optimizer.pending == 3
    assert equal(before, weights(never.model))
    best = trainer(
        tmp_path / "best", zo={**WAITS, "fold_every": 0}, max_steps=2, load_best_model_at_end=True,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="fold_every is 0, and load_best_model_at_end"):
        best.train()
