"""TRL's trainers with zeroth-order steps: SFT, DPO and reward models, by the mixin in second place."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.tiny import equal, llama, weights, words

trl = pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import LlamaForSequenceClassification  # noqa: E402

from zokern.integrations.transformers import ForwardOnly, ZOTrainer  # noqa: E402


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)


class ZOSFTTrainer(trl.SFTTrainer, ForwardOnly):
    pass


class ZODPOTrainer(trl.DPOTrainer, ZOTrainer):
    pass


class ZORewardTrainer(trl.RewardTrainer, ForwardOnly):
    pass


def config(kind: type, folder: Path, **given: Any) -> Any:
    return kind(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, logging_steps=1, save_strategy="steps", save_steps=2,
        max_length=8, dataset_num_proc=None, **{"max_steps": 4, **given},
    )  # fmt: skip


TEXTS = Dataset.from_list([{"text": f"w{i % 7} w{i % 5} w{i % 3} w9 w8"} for i in range(16)])
PAIRS = Dataset.from_list(
    [{"prompt": f"w{i % 7} w1", "chosen": f" w{i % 5} w2", "rejected": f" w{i % 3} w4 w4"} for i in range(16)]
)
JUDGED = Dataset.from_list([{"chosen": f"w{i % 7} w1 w2", "rejected": f"w{i % 3} w4"} for i in range(16)])


def classifier() -> Any:
    model = llama()
    model.config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LlamaForSequenceClassification(model.config)


CASES = {
    "sft": (ZOSFTTrainer, trl.SFTConfig, llama, TEXTS),
    "dpo": (ZODPOTrainer, trl.DPOConfig, llama, PAIRS),
    "reward": (ZORewardTrainer, trl.RewardConfig, classifier, JUDGED),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_trains_and_resumes_bit_for_bit(tmp_path: Path, case: str, adapter: bool) -> None:
    cls, settings, build, data = CASES[case]
    args = config(settings, tmp_path)
    lora = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS" if case == "reward" else "CAUSAL_LM"
    )

    def trainer() -> Any:
        torch.manual_seed(3)
        given = {"peft_config": copy.deepcopy(lora)} if adapter else {}
        if case == "dpo" and not adapter:
            given["ref_model"] = llama()
        zo = {"placement": "shadow" if adapter else "stream", "eps": 1e-2}
        return cls(build(), args=args, train_dataset=data, processing_class=words(), zo=zo, **given)

    whole = trainer()
    start = weights(whole.model)
    whole.train()
    opt = whole.zo_optimizer
    assert opt.counters["steps"] == 4
    assert opt.counters["forwards"] == 4 * 2 * 2
    moved = [not torch.equal(a, b) for a, b in zip(start, weights(whole.model), strict=True)]
    trained = [p.requires_grad for p in whole.model.parameters()]
    assert moved == trained
    assert all(p.grad is None for p in whole.model.parameters())

    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(weights(whole.model), weights(again.model))

    lines = [line for line in whole.state.log_history if "loss" in line]
    assert len(lines) == 4
    assert all(line["projected_gradient"] != 0 for line in lines)
    if case == "sft":  # TRL counts tokens in its compute_loss, which runs twice
        assert lines[-1]["num_tokens"] == 4 * 2 * 2 * 6  # five words and an end
        assert 0 <= lines[-1]["mean_token_accuracy"] <= 1


def test_what_carries_no_signal_is_refused(tmp_path: Path) -> None:
    class ZOGRPO(trl.GRPOTrainer, ForwardOnly):
        pass

    class ZOKTO(trl.KTOTrainer, ForwardOnly):
        pass

    with pytest.raises(TypeError, match=r"GRPOTrainer cannot.*detached copy.*trl\.RewardTrainer measures the reward"):
        ZOGRPO(llama(), lambda completions, **_: [0.0] * len(completions))
    with pytest.raises(TypeError, match="GRPOTrainer cannot"):
        ZOGRPO()  # before its own constructor, which may load a model
    with pytest.raises(TypeError, match=r"KTOTrainer cannot.*detached divergence"):
        ZOKTO(llama())
    args = config(trl.SFTConfig, tmp_path, loss_type="dft")
    with pytest.raises(ValueError, match="loss_type='dft' weighs tokens"):
        ZOSFTTrainer(llama(), args=args, train_dataset=TEXTS, processing_class=words())
    args = config(trl.DPOConfig, tmp_path, use_weighting=True)
    with pytest.raises(ValueError, match="use_weighting=True weighs pairs by detached"):
        ZODPOTrainer(llama(), args=args, train_dataset=PAIRS, processing_class=words())
    with pytest.raises(TypeError, match=r"write class Wrong\(SFTTrainer, ZOTrainer\)"):
        type("Wrong", (ZOTrainer, trl.SFTTrainer), {})
