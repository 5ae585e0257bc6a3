"""The study of rewards: what it climbs, that it is done piece by piece, and what docs/trl.md says of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.llm import search
from benchmarks.rewards import objective, page, run


def _said(text: str, word: str = "sea") -> dict[str, float]:
    message = [[{"role": "assistant", "content": text}]]
    return {name: reward(message, word=[word])[0] for name, reward in objective.REWARDS.items()}


@pytest.mark.parametrize(
    ("text", "word", "wanted"),
    [
        ("The sea is blue and it is deep.", "sea", (1.0, 1.0, 1.0, 1.0)),
        ("The Sea is deep, and wide.", "sea", (7 / 8, 1.0, 1.0, 1.0)),
        ("Horses run fast over the wide green fields!", "horse", (1.0, 1.0, 1.0, 1.0)),
        ("The sea is blue and it is deep", "sea", (1.0, 0.0, 1.0, 0.0)),
        ("The sea is blue. It is also deep.", "sea", (1.0, 0.0, 1.0, 0.0)),
        ("The ocean is blue and it is deep.", "sea", (1.0, 1.0, 0.0, 0.0)),
        ("The sea is deep.", "sea", (12 / 16, 1.0, 1.0, 0.0)),
        ("It costs 3.50 at sea, and that is cheap.", "sea", (15 / 16, 1.0, 1.0, 1.0)),
        ("", "sea", (0.5, 0.0, 0.0, 0.0)),
        ("sea " * 40, "sea", (0.0, 0.0, 1.0, 0.0)),
    ],
)
def test_how_far_a_text_is_from_the_form(text: str, word: str, wanted: tuple[float, ...]) -> None:
    assert tuple(_said(text, word).values()) == wanted


def test_no_prompt_of_one_part_is_in_another() -> None:
    parts = {name: [row["prompt"][-1]["content"] for row in objective.rows(name)] for name in objective.PARTS}
    every = [one for part in parts.values() for one in part]
    assert [len(part) for part in parts.values()] == [40, 16, 24]
    assert len(set(every)) == len(every) == len(objective.THINGS)


def _saved(folder: Path) -> str:
    words = sorted({word for thing in objective.THINGS for word in thing.split()} | {"."})
    known = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *words])}
    core = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    config = transformers.LlamaConfig(
        vocab_size=len(known), hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.filterwarnings("ignore:the completion of the prompt")  # a model that has learnt nothing ends where it will
def test_it_is_done_piece_by_piece_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(run, "FORWARDS", 4)
    monkeypatch.setattr(run, "METHODS", {"es": {"num_directions": 2, "antithetic": True}, "fzoo": {"candidates": 3}})
    monkeypatch.setattr(run, "LOOK", 2)
    monkeypatch.setattr(run, "SEEDS", (0, 1))
    monkeypatch.setattr(search, "MAX_GROWN", 0)
    monkeypatch.setitem(objective.PARTS, "test", slice(56, 60))
    monkeypatch.setitem(objective.PARTS, "validation", slice(40, 44))
    output = tmp_path / "rewards.json"
    small = {"steps": 2, "trial": 2, "tokens": 4, "eps": 0.3, "threads": 1, "rounds": 1, "output": output}
    given = [f"--{name}={value}" for name, value in {"model": _saved(tmp_path / "model"), **small}.items()]

    def call(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["run.py", *given, *more])
        run.main()
        return str(capsys.readouterr().out)

    first = call("--methods", "es", "--rounds=0")
    part = json.loads(output.read_text())
    assert part["complete"] is False
    assert [one["seed"] for one in part["results"]["methods"]["es"]["runs"]] == [0, 1]
    assert first.count("search") == 3
    assert "side" not in part["results"]

    second = call()
    whole = json.loads(output.read_text())
    assert whole["complete"] is True
    assert "ES" not in second  # nothing is done twice
    assert whole["results"]["methods"]["es"] == part["results"]["methods"]["es"]
    for method in whole["results"]["methods"].values():
        best = max(method["grid"], key=lambda point: (point["reward"], -point["lr"]))
        assert method["lr"] == best["lr"]
        assert all(one["looks"] == [0, 2] and len(one["train"]) == 2 for one in method["runs"])
        assert {one["reward"][0] for one in method["runs"]} == {method["runs"][0]["reward"][0]}  # each from the start
    assert call().count("stored") == 1

    for wrong in ("--rounds=-1", "--eps=0", "--eps=nan", "--trial=1"):  # before a model is read
        with pytest.raises(SystemExit):
            call("--model=nowhere", wrong)
        assert wrong.partition("=")[0] in capsys.readouterr().err

    monkeypatch.setattr(page, "load", lambda name: whole)
    made = {name: make() for name, make in page.PAGES["docs/trl.md"].items()}
    assert made["rewards-runs"].count("\n") == 3
    assert made["rewards-written"].count("\n") == 1 + run.SHOWN
    assert "2 steps of 4 directions over 2 prompts" in made["rewards-facts"]
    drawn: list[str] = []
    monkeypatch.setattr(page, "save", lambda figure, name, **how: drawn.append(name))
    page.draw()
    assert drawn == ["rewards"]


@pytest.mark.parametrize(
    ("given", "message"),
    [(["--methods", "mezo"], "unknown methods mezo; there are es, fzoo"), (["--steps", "1"], "at least 5")],
)
def test_options_that_cannot_be(given: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *given])
    with pytest.raises(SystemExit):
        run.main()
    assert message in capsys.readouterr().err
