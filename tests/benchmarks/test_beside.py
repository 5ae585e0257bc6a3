"""The step on a language model beside the released loop: that both have one loss, and what a process of it records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.llm import beside, released, reviews
from benchmarks.llm import beside_worker as worker
from zokern.finetune import Options, loop, methods, run
from zokern.finetune.data import TextSet

KIND, UNKIND = ("lovely", "fine", "warm"), ("dull", "cold", "weak")
ROWS = [0, 3, 4, 7]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run on a tiny model and its sentences, in files."""
    folder = tmp_path_factory.mktemp("beside")
    words = ["[PAD]", "[UNK]", "so", "It", "was", *KIND, *UNKIND, *reviews.WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]")
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    texts = [" ".join(["so"] * (i % 5) + [(KIND if i % 2 else UNKIND)[i % 3]]) for i in range(12)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reviews, "read", lambda: {"train": TextSet(texts, [i % 2 for i in range(12)])})
        bench = beside.Bench(folder, str(folder / "model"), None, torch.get_num_threads())
    return bench.options


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Any:
    """does(way, options, orders): the answers of the process of a way."""

    class Over(Exception):
        pass

    for module, name in ((loop, "Order"), (loop, "Clock"), (methods, "build"), (run, "train")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back at the end

    def does(way: str, given: dict[str, Any], *told: dict[str, Any]) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = []
        left = iter([{"way": way, "options": {**given, **beside.WAYS[way].more}}, *told])

        def hear() -> dict[str, Any]:
            for order in left:
                return order
            raise Over

        monkeypatch.setattr(worker, "hear", hear)
        monkeypatch.setattr(worker, "tell", lambda **answer: answers.append(answer))
        with pytest.raises(Over):
            worker.main()
        return answers

    return does


@pytest.mark.parametrize("way", beside.WAYS)
def test_a_process_says_what_memory_and_time_its_steps_took(
    way: str, options: dict[str, Any], orders: Any, tmp_path: Path
) -> None:
    weigh, time = ({"rows": ROWS, "steps": 2, "weigh": weigh} for weigh in (True, False))
    first, memory, took = orders(way, {**options, "output": str(tmp_path / "out")}, weigh, time)
    assert first == {"texts": 12}
    assert memory.keys() == {"resident", "alone", "loss", "forwards", "between"}
    assert memory["resident"] > 0
    assert memory["loss"] > 0
    assert took.keys() == {"seconds", "forwards", "passes", "rest", "tokens"}
    assert took["seconds"] == pytest.approx(took["forwards"] + took["passes"] + took["rest"])
    assert took["tokens"] == sum(i % 5 + 3 for i in ROWS)


def test_all_ways_have_one_loss(options: dict[str, Any], tmp_path: Path) -> None:
    task, pad = worker.loaded(Options(**options, packing="never", output=tmp_path / "out"))
    rows, targets = task.sets["train"]
    prompts = [rows.ids[i, : rows.lengths[i]].tolist() for i in ROWS]
    right = [targets[i] for i in ROWS]
    first = torch.tensor([word[0] for word in task.words])
    with torch.no_grad():
        ours = task.loss(task.batch("train", ROWS))
        theirs = released.loss(task.model, released.nested(prompts, task.words, right, pad))
        one_row = released.one_row(task.model, released.nested(prompts, [[]], right, pad), first)
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(one_row, ours)


def test_released_rows_are_a_prompt_and_a_word_padded_on_the_left() -> None:
    made = released.nested([[5, 6], [7, 8, 9]], [[1], [2, 3]], [1, 0], 0)
    assert made.ids.tolist() == [[0] * 5 + [5, 6, 1], [0] * 4 + [5, 6, 2, 3], [0] * 4 + [7, 8, 9, 1],
                                 [0] * 3 + [7, 8, 9, 2, 3]]  # fmt: skip
    assert torch.equal(made.mask, (made.ids != 0).long())
    assert made.words == [1, 2, 1, 2]
    assert released.nested([[1] * 8], [[2]], [0], 0).ids.shape == (1, 16)


def test_the_released_loss_averages_over_a_word(options: dict[str, Any]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(options["model"])
    prompts, words = [[2, 3], [2, 2, 4]], [[5], [6, 7]]
    with torch.no_grad():
        found = released.loss(model, released.nested(prompts, words, [0, 1], 0))
        scores = []
        for prompt in prompts:
            for word in words:
                spoken = model(input_ids=torch.tensor([prompt + word])).logits[0].log_softmax(-1)
                each = [spoken[len(prompt) + i - 1, token] for i, token in enumerate(word)]
                scores.append(torch.stack(each).mean())
    wanted = torch.nn.functional.cross_entropy(torch.stack(scores).view(2, 2), torch.tensor([0, 1]))
    torch.testing.assert_close(found, wanted)


def test_ways_that_differ_are_not_compared() -> None:
    beside.same("loss", {"a": 1.0, "b": 1.0005}, 1e-3)
    with pytest.raises(SystemExit, match=r"do not have the same tokens.*\(a: 10, c: 11\)"):
        beside.same("tokens", {"a": 10, "b": 10, "c": 11})


def test_a_process_that_ends_early_is_told(options: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "benchmarks" / "llm"
    other.mkdir(parents=True)
    for folder in (other.parent, other):
        (folder / "__init__.py").touch()
    (other / "beside_worker.py").write_text("raise SystemExit('other benchmarks')")
    process = beside.Process("finetune", {}, tmp_path, {})
    with pytest.raises(SystemExit, match=r"the process of 'finetune' ended early, with code 1: other benchmarks"):
        process.start()
    process.close()
