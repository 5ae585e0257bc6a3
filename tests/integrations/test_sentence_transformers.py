"""sentence-transformers' trainer by the mixin: bits through its checkpoint, its own groups, and losses with weights."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import zokern
from tests.integrations.tiny import VOCABULARY, equal, weights, words

st = pytest.importorskip("sentence_transformers")
from datasets import Dataset  # noqa: E402
from sentence_transformers.sentence_transformer import losses  # noqa: E402
from transformers import BertConfig, BertModel  # noqa: E402

from zokern.integrations.transformers import ForwardOnly  # noqa: E402

PAIRS = Dataset.from_list([{"a": f"w{i % 7} w1", "b": f"w{i % 5} w2"} for i in range(16)])
JUDGED = Dataset.from_list([{"a": f"w{i % 7} w1", "b": f"w{i % 5} w2", "label": i % 3} for i in range(8)])


class Tuner(st.SentenceTransformerTrainer, ForwardOnly):  # type: ignore[misc, name-defined]
    pass


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def encoder(saved: Path) -> Any:
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    return st.SentenceTransformer(modules=[Transformer(str(saved), max_seq_length=8), Pooling(8)], device="cpu")


def arguments(folder: Path, **given: Any) -> Any:
    usual = {
        "max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-4,
    }  # fmt: skip
    return st.SentenceTransformerTrainingArguments(str(folder), **{**usual, **given})


def test_trains_and_resumes_bit_for_bit(tmp_path: Path, saved: Path) -> None:
    """With dropout, under stream; a batch is one of a step's micro-batches, whose losses are means."""

    def trainer() -> Any:
        model = encoder(saved)
        loss = losses.MultipleNegativesRankingLoss(model)
        return Tuner(
            model, arguments(tmp_path), train_dataset=PAIRS, loss=loss, zo={"placement": "stream", "eps": 1e-2}
        )

    whole, again = trainer(), trainer()
    start = weights(whole.model)
    whole.train()
    assert whole.zo_optimizer.counters["forwards"] == 4 * 2 * 2
    assert any(not torch.equal(a, b) for a, b in zip(start, weights(whole.model), strict=True))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(weights(whole.model), weights(again.model))
    base = encoder(saved)
    assert zokern.journal.replay(tmp_path / "journal.zkj", base) == 4
    assert equal(weights(base), weights(whole.model))


def test_rates_by_name(tmp_path: Path, saved: Path) -> None:
    model = encoder(saved)
    args = arguments(tmp_path, learning_rate_mapping={"embeddings": 1e-5}, weight_decay=0.1)
    trainer = Tuner(model, args, train_dataset=PAIRS, loss=losses.MultipleNegativesRankingLoss(model))
    opt = trainer.create_optimizer()
    rates = {
        name: (group["lr"], group["weight_decay"])
        for group in opt.param_groups
        for p in group["params"]
        for name, one in model.named_parameters() if one is p
    }  # fmt: skip
    assert len(rates) == len(list(model.parameters()))
    assert {rate for name, (rate, _) in rates.items() if "embeddings" in name} == {1e-5}
    assert {rate for name, (rate, _) in rates.items() if "embeddings" not in name} == {1e-4}
    assert {decay for name, (_, decay) in rates.items() if name.endswith("bias")} == {0.0}
    assert {decay for name, (_, decay) in rates.items() if name.endswith("query.weight")} == {0.1}
    assert opt.module is model
    args.learning_rate_mapping = {".*": 1e-5}  # leaves nothing in the others
    trainer = Tuner(model, args, train_dataset=PAIRS, loss=losses.MultipleNegativesRankingLoss(model))
    assert [group["lr"] for group in trainer.create_optimizer().param_groups] == [1e-5, 1e-5]


def test_a_loss_with_weights_of_its_own(tmp_path: Path, saved: Path) -> None:
    """They are trained with an optimizer of both; without it they would not be, in silence."""

    def trainer(**given: Any) -> Any:
        torch.manual_seed(0)
        model = encoder(saved)
        loss = losses.SoftmaxLoss(model, 8, 3)
        both = torch.nn.ModuleList([model, loss])
        if given.pop("both", False):
            given["optimizers"] = (zokern.MeZO(both, lr=1e-3), None)
        return Tuner(model, arguments(tmp_path, max_steps=1), train_dataset=JUDGED, loss=loss, **given), both

    with pytest.raises(ValueError, match="none of model's"):
        trainer(optimizer_cls_and_kwargs=(zokern.FZOO, {}))[0].train()
    with pytest.raises(ValueError, match=r"Tuner: 2 of the parameters .* \[\(3, 24\), \(3,\)\], are none of model's"):
        trainer()[0].train()
    run, both = trainer(both=True)
    before = weights(both)
    run.train()
    assert all(not torch.equal(a, b) for a, b in zip(before[-2:], weights(both)[-2:], strict=True))
