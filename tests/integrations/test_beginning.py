"""What a training says at its beginning: of its lr, its length and its eps."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import zokern
from tests.integrations.tiny import arguments, llama, rows

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
from transformers import TrainerState

from zokern.integrations import beginning, published
from zokern.integrations.transformers import ZOTrainer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    torch.set_num_threads(1)


Lines = list[str]


@pytest.fixture
def said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Trains, and gives zokern's lines."""

    def train(model: Any = None, resume: str | None = None, options: Any = None, **given: Any) -> Lines:
        usual = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        args = arguments(tmp_path, **{**usual, **given})
        trainer = ZOTrainer(model or llama(), args, train_dataset=rows(), **(options or {}))
        capsys.readouterr()
        trainer.train(resume_from_checkpoint=None if resume is None else str(tmp_path / resume))
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("zokern: ")]

    return train


def lrs(lines: Lines) -> list[str]:
    return [re.findall(r"lr (\S+) is", line)[0] for line in lines if "rule of thumb" in line]


# ------------------------------------------------------------------------------------------------------------ resumed runs


def test_a_resumed_run_speaks_of_the_lr_that_it_has(said: Any) -> None:
    """That is the checkpoint's, as transformers has it: optimizer.pt and scheduler.pt come over the arguments."""
    assert lrs(said(learning_rate=1e-4)) == ["0.0001"]
    lines = said(learning_rate=5e-4, resume="checkpoint-2")
    assert lrs(lines) == ["0.0001"]
    (told,) = [line for line in lines if "is not used" in line]
    assert told.startswith(
        "zokern: learning_rate 0.0005 is not used: the run goes on with its checkpoint's, 0.0001. To "
    )
    assert "from_pretrained(checkpoint), and no resume_from_checkpoint" in told
    same = said(learning_rate=1e-4, resume="checkpoint-2")
    assert lrs(same) == ["0.0001"]
    assert not any("is not used" in line for line in same)


def test_the_lr_of_a_resumed_run_is_the_checkpoints(tmp_path: Path) -> None:
    for lr, resume in ((1e-4, None), (5e-4, str(tmp_path / "checkpoint-2"))):
        args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=lr, logging_steps=1)
        trainer = ZOTrainer(llama(), args, train_dataset=rows())
        trainer.train(resume_from_checkpoint=resume)
        logged = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
        assert logged == pytest.approx([1e-4, 0.75e-4, 0.5e-4, 0.25e-4])


def test_where_the_checkpoint_has_no_optimizer_the_arguments_lr_counts(said: Any) -> None:
    said(learning_rate=1e-4, save_only_model=True)
    with pytest.warns(zokern.ZokernWarning, match="has no optimizer"):
        lines = said(learning_rate=5e-4, resume="checkpoint-2")
    assert lrs(lines) == ["0.0005"]
    assert not any("is not used" in line for line in lines)


def test_an_lr_that_the_run_has_lowered_itself_is_not_told(said: Any) -> None:
    given = {"learning_rate": 1e-2, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps",
             "eval_steps": 1, "lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0}}  # fmt: skip
    given["options"] = {"eval_dataset": rows(4)}
    said(**given)
    assert not any("is not used" in line for line in said(resume="checkpoint-2", **given))


def test_warmup_does_not_hide_the_lr(said: Any) -> None:
    assert lrs(said(learning_rate=1e-4, warmup_steps=2)) == ["0.0001"]


# -------------------------------------------------------------------------------------------------------------- short runs


def test_a_run_that_is_too_short_to_learn_is_told(said: Any) -> None:
    told = (
        "zokern: the run has 4 steps, 8 forwards: enough to see that all of it runs; whether it learns, some hundred steps "
        "show (max_steps, docs/choose.md)"
    )
    assert told in said()
    assert told in said(resume="checkpoint-2")  # of the whole run
    assert told.replace("4 steps, 8", "3 steps, 24") in said(
        num_train_epochs=1, max_steps=-1, per_device_train_batch_size=8, options={"zo": {"num_samples": 4}}
    )
    many = {"zo": {"num_samples": 25}}  # 200 forwards
    assert not any("the run has" in line for line in said(options=many))


def test_a_search_of_hyperparameters_has_no_such_line(tmp_path: Path) -> None:
    trainer = ZOTrainer(llama(), arguments(tmp_path), train_dataset=rows())
    trainer.create_optimizer()
    for searched in (False, True):
        state = TrainerState(max_steps=4, is_hyper_param_search=searched)
        lines = list(beginning.told(trainer, trainer.zo_optimizer, trainer.args, state))
        assert any("the run has 4 steps" in line for line in lines) is not searched


# --------------------------------------------------------------------------------------------------------- eps of adapters


def adapted(kind: str = "lora", **more: Any) -> Any:
    peft = pytest.importorskip("peft")
    if kind == "prompt":
        return peft.get_peft_model(llama(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **more))


def eps(lines: Lines) -> Lines:
    return [line for line in lines if "eps is" in line]


def test_the_default_eps_with_an_adapter_is_told(said: Any) -> None:
    (told,) = eps(said(adapted()))
    assert told == (
        "zokern: eps is 0.001, the default; for LoRA MeZO's paper has 0.01: zo={'eps': 0.01} (docs/trainer.md#lora)"
    )
    assert eps(said(adapted(), resume="checkpoint-2")) == []  # it could not be changed any more
    assert eps(said(adapted(), options={"zo": {"eps": 1e-2}})) == []
    assert eps(said(adapted(), options={"zo": {"eps": 1e-3}})) == []  # as somebody wants it
    assert eps(said()) == []


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        ({}, {"zo": "hizoo"}, "for LoRA MeZO's paper has 0.01: zo={'method': 'hizoo', 'eps': 0.01} (docs"),
        (
            {},
            {"optimizer_cls_and_kwargs": (zokern.HiZOO, {})},
            ": optimizer_cls_and_kwargs=(HiZOO, {'eps': 0.01}) (docs",
        ),
        (
            {"use_dora": True},
            {},
            "for LoRA, the nearest kind that was published, MeZO's paper has 0.01: zo={'eps': 0.01}",
        ),
        ({"kind": "prompt"}, {}, "for prompt tuning arXiv 2402.11592 has 0.01: zo={'eps': 0.01}"),
    ],
)
def test_by_kind_and_method(said: Any, model: Any, options: Any, told: str) -> None:
    (line,) = eps(said(adapted(**model), options=options))
    assert told in line


def test_an_adapter_that_is_not_trained_has_none() -> None:
    peft = pytest.importorskip("peft")
    assert published.trained(adapted()) == "lora"
    assert published.trained(llama()) == ""
    assert (
        published.trained(peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], inference_mode=True)))
        == ""
    )
    assert published.other_eps(adapted(), 1e-2) is None


def test_an_optimizer_of_ones_own_has_its_own_eps_and_lr(said: Any) -> None:
    model = adapted()
    own = zokern.MeZO(model, lr=1e-6)
    lines = said(model, options={"optimizers": (own, None)})
    assert eps(lines) == lrs(lines) == []
