"""Updates that wait (fold_every) in the Trainer's checkpoints and journals: nothing is added twice, and nothing is lost."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import zokern
from tests.integrations.tiny import equal, llama, weights
from zokern import journal

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.integrations.waits import WAITS, close, played, trainer

HALVES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    torch.set_num_threads(1)


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
                assert journal.replay(tmp_path / "journal.zkj", llama(dtype), until=until, fold=False).verified


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
