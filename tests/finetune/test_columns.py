"""Texts of several columns: templates over any of them, pairs for encoders, and which text gives way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.finetune import test_finetune  # noqa: E402
from tests.finetune.test_fitting import byte_level, prompt_of  # noqa: E402
from zokern.finetune import FinetuneError, Options, data, finetune  # noqa: E402
from zokern.finetune.examples import Example, key  # noqa: E402
from zokern.finetune.tasks import Classifier  # noqa: E402

models_dir = test_finetune.models_dir
TEMPLATE = "{premise}? {hypothesis}"


def rows(count: int = 24) -> list[dict[str, Any]]:
    words = [*test_finetune.ANIMALS, *test_finetune.FRUITS]
    return [
        {
            "premise": f"the {words[i % 12]} {i}",
            "hypothesis": f"a {words[(i + i % 2) % 12]}",
            "label": ["animal", "fruit"][i % 2],
        }
        for i in range(count)
    ]


def written(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def options(tmp_path: Path, models_dir: Path) -> Options:
    return Options(
        model=str(models_dir / "gpt"), data=written(tmp_path / "pairs.jsonl", rows()), output=tmp_path / "out", steps=2,
        eval_every=0, batch_size=4, max_length=32, device="cpu", threads=1, template=TEMPLATE, force=True,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- templates


def test_a_template_takes_any_columns(options: Options) -> None:
    options.objective = "prompt"
    found = data.load(options)
    assert len(found.train) + len(found.eval) == 24
    assert all(isinstance(text, Example) and len(text.parts) == 2 for text in found.train.texts)
    options.template = "{hypothesis} {text} {hypothesis}"
    options.text_column = "premise"  # what {text} stands for
    again = data.load(options)
    assert {text.parts for text in again.train.texts} <= {(row["hypothesis"], row["premise"]) for row in rows()}
    options.template = "{premise} Topic:"  # one column is a plain text
    assert set(data.load(options).train.texts) <= {row["premise"] for row in rows()}


def test_what_stands_in_braces_in_a_text_stays() -> None:
    prompt = prompt_of(byte_level(), ["good", "bad"], 60, "{a}|{b}|{a} It was")
    [ids], _ = prompt.frame.prompts([Example(("{b}", "{a} {text}"))])
    assert byte_level().decode(ids) == "{b}|{a} {text}|{b} It was"


def test_a_run_over_two_columns_and_its_hashes(options: Options) -> None:
    summary = finetune(options)
    assert summary.objective == "prompt"
    hashes = json.loads((summary.output.directory / "options.json").read_text())["run"]["hashes"]
    options.template = "{hypothesis}? {premise}"
    other = json.loads((finetune(options).output.directory / "options.json").read_text())["run"]["hashes"]
    assert hashes["train"] != other["train"]
    assert hashes["labels"] == other["labels"]


def test_equal_parts_are_one_text_only_in_the_same_order() -> None:
    assert len({key(Example(parts)) for parts in [("a", "b"), ("b", "a"), ("a b", ""), ("a", '"b"')]}) == 4
    assert key("plain") == "plain"  # the hash of runs before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"template": "{premise} {nope}"},
            r"line 1: no column 'nope'; the columns are 'premise'.* \{nope\} in --template stands for a column: write one",
        ),
        (
            {"cut": "label"},
            "--cut is 'label', and the texts are of the columns 'premise', 'hypothesis'; give one of them",
        ),
        ({"pair_column": "hypothesis"}, "--pair-column is for --objective classifier, and the objective is prompt"),
        (
            {"chat": True, "objective": "classifier"},
            "--chat is for prompt, choices, answer, and the objective is classifier",
        ),
        (
            {"verbalizers": Path(__file__), "objective": "classifier"},
            "--verbalizers is for --objective prompt, and the objective is classifier; leave it out",
        ),
        (
            {"descriptions": Path(__file__)},
            "--descriptions is for --objective similarity, and the objective is prompt; leave it out",
        ),
        ({"data": "docstrings"}, "--data docstrings has one text a row"),
        ({"template": "no place"}, "it must contain {text}, where each text is put in, or the name of another column"),
    ],
)
def test_columns_that_do_not_fit(change: dict[str, Any], message: str, options: Options) -> None:
    for name, value in change.items():
        setattr(options, name, value)
    with pytest.raises(FinetuneError, match=message):
        finetune(options)
    assert not options.output.exists()


def test_rows_without_any_text_are_left_out(tmp_path: Path, options: Options) -> None:
    lines = rows()
    lines[0]["premise"] = ""
    lines[1]["premise"] = lines[1]["hypothesis"] = None
    options.data = written(tmp_path / "gaps.jsonl", lines)
    options.objective = "prompt"
    assert data.load(options).left_out["train"].counts == {"no text": 1}  # a prompt may have a gap
    options.objective, options.text_column, options.pair_column = "classifier", "premise", "hypothesis"
    assert data.load(options).left_out["train"].counts == {"no text": 2}  # a pair may not


# ------------------------------------------------------------------------------------------------------------ what is cut


def test_the_longest_texts_give_way_or_the_one_that_is_named() -> None:
    row = Example(("first " * 10, "second " * 4, "third"))
    template = "{a}. {b}. {c}. It was"
    prompt = prompt_of(byte_level(), ["good", "bad"], 48, template)
    [ids], cut = prompt.frame.prompts([row])
    said = byte_level().decode(ids)
    assert said == "first first first. second second seco. third. It was"  # 18 tokens at most
    assert (cut.count, len(ids), cut.longest) == (1, 47, 60 + 28 + 5 + 7)
    prompt = prompt_of(byte_level(), ["good", "bad"], 84, template, cut=1)
    [ids], _ = prompt.frame.prompts([row])
    assert byte_level().decode(ids) == f"{'first ' * 10}. second secon. third. It was"
    prompt = prompt_of(byte_level(), ["good", "bad"], 48, template, cut=2)
    with pytest.raises(FinetuneError, match="all columns but 'c', which --cut lets give way, has up to 95 tokens"):
        prompt.frame.prompts([row])


def test_cut_texts_are_told_and_words_are_whole(options: Options, capsys: pytest.CaptureFixture) -> None:
    options.max_length, options.cut = 8, "premise"
    lines = rows()
    lines[3]["premise"] = "big " * 30
    options.data = written(Path(options.data), lines)
    finetune(options)
    assert "of 19 texts" in (said := capsys.readouterr().out) or "of 5 texts" in said
    assert "are cut to 8 tokens; --max-length 33 cuts none" in said


# ------------------------------------------------------------------------------------------------------------------ pairs


class Marking:
    """The suite's tokenizer with BERT's marks for pairs."""

    def __new__(cls) -> Any:
        made = test_finetune.tokenizer(True)
        made.backend_tokenizer.post_processor = test_finetune.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        return made


@torch.no_grad()
def test_an_encoder_gets_pairs_with_marks_and_types(models_dir: Path) -> None:
    model, _ = test_finetune.load("classifier", models_dir, "classifier", ["animal", "fruit"])
    tokenizer = Marking()
    task = Classifier(model, tokenizer, ["animal", "fruit"], 32)
    texts = [Example((row["premise"], row["hypothesis"])) for row in rows()]
    task.add("eval", data.TextSet([*texts], [i % 2 for i in range(24)]))
    wanted = [5, 0, *range(6, 24)]
    batch = task.batch("eval", wanted)
    assert len(batch.groups) == 2
    assert set(batch.groups[0].types[0].tolist()) == {0, 1}
    expected = torch.cat([
        model(**tokenizer(*texts[i].parts, return_token_type_ids=True, return_tensors="pt")).logits for i in wanted
    ])  # fmt: skip
    torch.testing.assert_close(task.logits(batch), expected, rtol=1e-4, atol=1e-5)
    untyped = torch.cat([model(**tokenizer(*texts[i].parts, return_token_type_ids=False, return_tensors="pt")).logits
                         for i in wanted])  # fmt: skip
    assert not torch.allclose(untyped, expected, rtol=1e-2)
    model.config.type_vocab_size = 1  # RoBERTa and its kin have no such marks
    task.add("eval", data.TextSet([*texts], [i % 2 for i in range(24)]))
    assert task.sets["eval"][0].types is None


def test_pairs_are_cut_on_both_sides_or_where_it_is_said(models_dir: Path) -> None:
    model, _ = test_finetune.load("classifier", models_dir, "classifier", ["animal", "fruit"])
    task = Classifier(model, Marking(), ["animal", "fruit"], 13)
    long = data.TextSet([Example(("cat " * 20, "fig " * 8)), Example(("cat", "fig"))], [0, 1])
    task.add("eval", long)
    assert (task.cuts["eval"].count, task.cuts["eval"].longest) == (1, 31)
    ids = task.sets["eval"][0].ids[0].tolist()
    cat, fig = (task.tokenizer.convert_tokens_to_ids(word) for word in ("cat", "fig"))
    assert (ids.count(cat), ids.count(fig), ids.count(3)) == (5, 5, 2)
    task.cut = 0
    task.add("eval", long)
    ids = task.sets["eval"][0].ids[0].tolist()
    assert (ids.count(cat), ids.count(fig), len(ids)) == (2, 8, 13)
    task.max_length = 10
    with pytest.raises(FinetuneError, match=r"up to 11 tokens without the text that --cut lets give way"):
        task.add("eval", long)


def test_a_run_over_pairs_learns_from_both(options: Options, models_dir: Path, tmp_path: Path) -> None:
    Marking().save_pretrained(tmp_path / "tok")
    model, _ = test_finetune.load("classifier", models_dir, "classifier", ["animal", "fruit"])
    model.save_pretrained(tmp_path / "tok")
    options.model, options.text_column, options.pair_column = str(tmp_path / "tok"), "premise", "hypothesis"
    summary = finetune(options)
    assert (summary.objective, summary.result.steps) == ("classifier", 2)
    options.objective = "similarity"
    with pytest.raises(
        FinetuneError, match="--pair-column is for --objective classifier, and the objective is similarity"
    ):
        finetune(options)
