"""TRL's trainers, those of sentence-transformers, and rewards, in several processes: by the mixin they are as ZOTrainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.many import run
from tests.integrations.tiny import VOCABULARY, arguments, equal, llama, weights, words

pytest.importorskip("trl")
st = pytest.importorskip("sentence_transformers")


def quiet() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"


def tuned(folder: str, kind: str, accumulation: int, zo: dict[str, Any]) -> dict[str, Any]:
    import trl
    from datasets import Dataset

    from zokern.integrations.transformers import ForwardOnly

    quiet()
    base, settings = (trl.SFTTrainer, trl.SFTConfig) if kind == "sft" else (trl.DPOTrainer, trl.DPOConfig)
    texts = Dataset.from_list([{"text": " ".join(f"w{(i * k) % 11}" for k in range(1, 3 + i % 4))} for i in range(16)])
    pairs = Dataset.from_list(
        [{"prompt": f"w{i % 7} w1", "chosen": f" w{i % 5} w2", "rejected": f" w{i % 3} w4 w4"} for i in range(16)]
    )
    cls, model = type("Tuner", (base, ForwardOnly), {}), llama()
    args = settings(
        output_dir=folder, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation, learning_rate=1e-2,
        use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, logging_steps=1, save_strategy="no", max_length=8,
        max_steps=4, dataset_num_proc=None,
    )  # fmt: skip
    given = {"ref_model": llama()} if kind == "dpo" else {}
    trainer = cls(
        model, args=args, train_dataset=texts if kind == "sft" else pairs, processing_class=words(),
        zo={"eps": 1e-2, "placement": "shadow", **zo}, **given,
    )  # fmt: skip
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "weights": weights(model), "losses": [line["loss"] for line in lines], "tokens": lines[-1].get("num_tokens"),
        "forwards": trainer.zo_optimizer.counters["forwards"],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("parallel", ["data", "directions"])
def test_trls_trainers(tmp_path: Path, kind: str, parallel: str) -> None:
    """SFT counts tokens over all ranks, and gathers its metrics in each forward."""
    parts = 2 if parallel == "data" else 1
    (alone,) = run(1, tuned, str(tmp_path), kind, 2, {})
    for rank in run(2, tuned, str(tmp_path), kind, 2 // parts, {"parallel": parallel}):
        assert equal(rank["weights"], alone["weights"])
        assert rank["losses"] == alone["losses"]
        assert rank["forwards"] * 2 == alone["forwards"]
        assert rank["tokens"] == alone["tokens"]


def rewarded(
    folder: str, accumulation: int, zo: dict[str, Any], batched: bool = False
) -> tuple[list[Tensor], list[float], list[float]]:
    from zokern.integrations.trl import RewardTrainer

    quiet()
    data = [{"prompt": f"w{i % 7} w{i % 5}" + " w3" * (i % 3)} for i in range(12)]

    def even(completions: list[str], **_: Any) -> list[float]:
        return [sum(int(w[1:]) % 2 == 0 for w in text.split()) / max(len(text.split()), 1) for text in completions]

    model = llama()
    args = arguments(
        Path(folder), learning_rate=3e-2, max_steps=3, gradient_accumulation_steps=accumulation, logging_steps=1,
        eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=2,
    )  # fmt: skip
    trainer = RewardTrainer(
        model, even, args, data, data[:7], words(), generation={"max_new_tokens": 5, "suppress_tokens": [0, 1, 2]},
        zo={"eps": 0.3, **zo}, batched=batched,
    )  # fmt: skip
    trainer.train()
    history = trainer.state.log_history
    return weights(model), *[[line[name] for line in history if name in line] for name in ("reward", "eval_reward")]


def test_rewards_are_those_of_all_ranks(tmp_path: Path) -> None:
    zo = {"num_directions": 2}
    ((alone, rewards, evaluated),) = run(1, rewarded, str(tmp_path), 2, zo)
    for model, seen, at_the_end in run(2, rewarded, str(tmp_path), 1, zo):
        assert equal(model, alone)
        assert seen == pytest.approx(rewards)
        assert at_the_end == pytest.approx(evaluated)


@pytest.mark.parametrize("parallel", ["data", "directions"])
def test_rewards_of_all_directions_at_once_on_all_ranks(tmp_path: Path, parallel: str) -> None:
    zo = {"num_directions": 4, "placement": "forward", "distribution": "lowrank:1"}
    ((alone, rewards, evaluated),) = run(1, rewarded, str(tmp_path), 2, zo)
    accumulation, shared = 1 if parallel == "data" else 2, {**zo, "parallel": parallel}
    for model, seen, at_the_end in run(2, rewarded, str(tmp_path), accumulation, shared, True):
        assert equal(model, alone)
        assert seen == pytest.approx(rewards)
        assert at_the_end == pytest.approx(evaluated)


def encoded(folder: str, saved: str, accumulation: int) -> tuple[list[Tensor], int, int]:
    from datasets import Dataset
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    from zokern.integrations.transformers import ForwardOnly

    quiet()
    cls = type("Tuner", (st.SentenceTransformerTrainer, ForwardOnly), {})
    data = Dataset.from_list([{"a": f"w{i % 7} w1", "b": f"w{i % 5} w2"} for i in range(16)])
    model = st.SentenceTransformer(modules=[Transformer(saved, max_seq_length=8), Pooling(8)], device="cpu")
    args = st.SentenceTransformerTrainingArguments(
        folder, num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=accumulation, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=1e-4,
    )  # fmt: skip
    trainer = cls(
        model, args, train_dataset=data, loss=losses.MultipleNegativesRankingLoss(model),
        zo={"eps": 1e-2, "placement": "shadow"},
    )  # fmt: skip
    trainer.train()
    return weights(model), trainer.state.global_step, trainer.zo_optimizer.counters["forwards"]


def test_sentence_transformers(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    saved = str(tmp_path / "encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(saved)
    words().save_pretrained(saved)
    ((alone, steps, forwards),) = run(1, encoded, str(tmp_path), saved, 2)
    found = run(2, encoded, str(tmp_path), saved, 1)
    assert [made for _, _, made in found] == [8, 8]
    assert forwards == 16
    for model, made, _ in found:
        assert made == steps == 4
        assert equal(model, alone)
