"""The benchmark on a language model: its batches of one shape, its sentences, and that a broken-off one goes on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.llm import reviews, run
from benchmarks.llm.task import LONGEST, Sentiment, padded
from zokern.finetune.data import TextSet
from zokern.finetune.embedded import movies

KIND, UNKIND = ("lovely", "fine", "warm"), ("dull", "cold", "weak")


def texts(count: int, seed: int) -> TextSet:
    draw = torch.Generator().manual_seed(seed)
    rows, targets = [], []
    for i in range(count):
        words = KIND if i % 2 else UNKIND
        length = int(torch.randint(1, 9, (), generator=draw))
        rows.append(" ".join(["so"] * length + [words[int(torch.randint(3, (), generator=draw))]]))
        targets.append(i % 2)
    return TextSet(rows, targets)


def sentiment() -> Sentiment:
    words = ["[PAD]", "[UNK]", "so", "It", "was", *KIND, *UNKIND, *reviews.WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]")
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=LONGEST, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    return Sentiment(model, tokenizer, {"train": texts(40, 0), "validation": texts(12, 1), "test": texts(300, 2)})


def saved(folder: Path) -> str:
    """The tiny model as save_pretrained writes it."""
    made = sentiment()
    model: Any = made.model
    model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def test_padding_on_the_left_changes_no_logits() -> None:
    task = sentiment()
    batch = task.take("train", [3, 0, 7])
    shown = task.logits(batch)
    for i, row in enumerate(batch["ids"]):
        real = row[row != 0][None]
        alone: Tensor = task.model(input_ids=real).logits[0, -1].index_select(0, task.words)
        torch.testing.assert_close(shown[i], alone, rtol=1e-4, atol=1e-5)
    assert {len({tuple(value.shape[1:]) for value in part.values() if value.dim() == d}) for part in task.sets.values()
            for d in (2, 4)} == {1}  # fmt: skip


def test_a_place_of_padding_sees_itself_and_nothing_else() -> None:
    out = padded(torch.tensor([[5, 6, 0, 0], [7, 8, 9, 4]]), [2, 4])
    assert out["ids"][0, 2:].tolist() == [5, 6]
    assert out["mask"][0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert out["positions"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_evaluation_counts_every_text() -> None:
    task = sentiment()
    one, many = task.evaluate("test", size=300), task.evaluate("test", size=7)
    assert one["accuracy"] == many["accuracy"]
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-5)


class _Kept:
    """What is stored, and a stop after so many pieces."""

    def __init__(self, stop: int | None = None) -> None:
        self.pieces, self.stop = 0, stop

    def __call__(self, results: dict[str, Any]) -> None:
        self.results = json.loads(json.dumps(results))
        self.pieces += 1
        if self.pieces == self.stop:
            raise run.OutOfTime


def _bench(keep: _Kept, results: dict[str, Any], *methods: str, seconds: int = 0) -> run.Bench:
    options = argparse.Namespace(methods=list(methods), budget=60, trial=30, seconds=seconds, compiled=False)
    return run.Bench(sentiment(), keep, options, results)


def _told(results: dict[str, Any]) -> dict[str, Any]:
    """Without what the clock says."""
    return json.loads(
        json.dumps(results), object_hook=lambda d: {k: v for k, v in d.items() if k != "seconds_per_step"}
    )


def test_a_broken_off_benchmark_goes_on_to_the_same_results() -> None:
    whole, first, second = _Kept(), _Kept(stop=5), _Kept()
    with torch.no_grad():
        _bench(whole, {}, "mezo", "lora-adam").all()
        with pytest.raises(run.OutOfTime):
            _bench(first, {}, "mezo", "lora-adam").all()
        _bench(second, first.results, "mezo", "lora-adam").all()
    assert _told(second.results) == _told(whole.results)
    assert second.pieces == whole.pieces - 5
    mezo, lora = whole.results["mezo"], whole.results["lora-adam"]
    assert [one["seed"] for one in mezo["runs"]] == [0, 1, 2]
    assert mezo["runs"][0]["steps"] == 30
    assert mezo["lr"] == min(mezo["grid"], key=lambda point: point["loss"])["lr"]
    assert lora["runs"][0]["curve"][-1]["loss"] < lora["runs"][0]["curve"][0]["loss"]


def test_a_run_that_is_cut_says_so_and_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LOOK_AT_CLOCK", 3)
    kept = _Kept()
    bench = _bench(kept, {"mezo": {"grid": [{"lr": lr, "loss": lr} for lr in run.METHODS["mezo"].grid], "runs": []}},
                   "mezo", seconds=1)  # fmt: skip
    bench.begun -= 10
    with torch.no_grad(), pytest.raises(run.OutOfTime):
        bench.all()
    (cut,) = kept.results["mezo"]["runs"]
    assert cut["cut"]
    assert cut["steps"] == 3
    assert cut["curve"][-1]["step"] == 3
    again = _Kept()
    with torch.no_grad():
        _bench(again, kept.results, "mezo").all()
    assert [(one["steps"], one["cut"]) for one in again.results["mezo"]["runs"]] == [(30, False)] * 3


def test_other_results_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "llm.json"
    path.write_text(json.dumps({"complete": False, "settings": {"eps": 1.0}, "results": {}, "machine": {}}))
    with pytest.raises(SystemExit, match="holds other results"):
        run._former(path, {"eps": 2.0}, torch.device("cpu"))
    with pytest.raises(SystemExit, match="was begun on"):
        run._former(path, {"eps": 1.0}, torch.device("cpu"))
    assert run._former(tmp_path / "none.json", {}, torch.device("cpu")) == {}


def test_sentences_are_cut_into_the_three_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    rated = [(f"sentence {i}", (-1.0) ** i * (1 + i % 3)) for i in range(3000)]
    monkeypatch.setattr(movies, "rated", lambda: [*rated, ("neither", 0.1), ("sentence 0", 2.0)])
    sets = reviews.read()
    assert {name: len(part) for name, part in sets.items()} == reviews.SIZES
    every = [text for part in sets.values() for text in part.texts]
    assert len(set(every)) == len(every)
    assert "neither" not in every
    assert all(target == 1 - int(text.split()[1]) % 2 for part in sets.values()
               for text, target in zip(part.texts, part.targets, strict=True))  # fmt: skip
