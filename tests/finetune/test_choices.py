"""Candidates that each row brings: which is right, how they are scored, and runs of decoders and encoder-decoders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.finetune import test_finetune  # noqa: E402
from tests.finetune.test_columns import written  # noqa: E402
from zokern.finetune import FinetuneError, Options, data, finetune, identity  # noqa: E402
from zokern.finetune.candidates import Choices, Spoken  # noqa: E402
from zokern.finetune.examples import Example  # noqa: E402
from zokern.finetune.framing import Frame  # noqa: E402
from zokern.finetune.tasks import evaluate  # noqa: E402
from zokern.tasks.metrics import METRICS  # noqa: E402

models_dir = test_finetune.models_dir
ANIMALS, FRUITS = test_finetune.ANIMALS, test_finetune.FRUITS


@pytest.fixture(scope="session")
def t5_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder-decoder."""
    root = tmp_path_factory.mktemp("t5")
    config = transformers.T5Config(vocab_size=len(test_finetune.tokenizer(True)), d_model=16, d_kv=8, d_ff=16, num_layers=1,
                                   num_heads=2, decoder_start_token_id=0, eos_token_id=3, pad_token_id=0)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.T5ForConditionalGeneration(config).save_pretrained(root)
    test_finetune.tokenizer(True).save_pretrained(root)
    return root


def examples(count: int = 20) -> list[Example]:
    """Two to four candidates of one to three tokens; two are right in every fifth row."""
    return [
        Example((f"the {ANIMALS[i % 6]} {i}",), tuple(f"a {FRUITS[(i + c) % 6]} {c}"[: 1 if c == 2 else None]
                for c in range(2 + i % 3)), (0, 1) if i % 5 == 0 else (i % 2,)) for i in range(count)
    ]  # fmt: skip


def task_of(kind: str, root: Path, **more: Any) -> Choices:
    model, tok = test_finetune.load(kind, root, "choices", [])
    tok.pad_token = tok.pad_token or "[PAD]"
    return Choices(model, tok, Frame(tok, "{text} is", 32, **more), 64, [])


def expected_scores(task: Choices, text: Example) -> torch.Tensor:
    tok, model, found = task.tokenizer, task.model, []
    for candidate in text.candidates:
        end = tok(candidate, add_special_tokens=False, return_tensors="pt")["input_ids"]
        prompt = tok(f"{text.parts[0]} is", return_tensors="pt")["input_ids"]
        if task.frame.encoder:
            start = torch.cat([torch.tensor([[2]]), end], 1)  # [CLS], as its tokenizer begins texts
            spoken = model(input_ids=prompt, labels=start).logits[0].log_softmax(-1)
            found.append(spoken.gather(1, start.T).mean())
        else:
            spoken = model(torch.cat([prompt, end], 1)).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
            found.append(spoken.gather(1, end.T).mean())
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt", "t5"])
def test_scores_and_loss_are_their_definition(kind: str, models_dir: Path, t5_dir: Path) -> None:
    if kind == "t5":
        task = task_of(".", t5_dir, encoder=True)
    else:
        task = task_of("gpt", models_dir)
    texts = examples()
    task.add("eval", data.TextSet([*texts], [text.right[0] for text in texts]))
    wanted = [7, 3, 0, *range(10, 20)]
    batch = task.batch("eval", wanted)
    assert len(batch.groups) > 1
    expected = [expected_scores(task, texts[i]) for i in wanted]
    logits = task.logits(batch)
    assert logits.shape == (13, 4)
    for got, right in zip(logits, expected, strict=True):
        torch.testing.assert_close(got[: len(right)], right, rtol=1e-4, atol=1e-5)
        assert (got[len(right) :] == float("-inf")).all()
    shares = [scores.softmax(0)[list(texts[i].right)].sum() for i, scores in zip(wanted, expected, strict=True)]
    torch.testing.assert_close(task.loss(batch), -torch.stack(shares).log().mean(), rtol=1e-4, atol=1e-5)
    best = [int(expected_scores(task, text).argmax()) for text in texts]
    right = [b in text.right for b, text in zip(best, texts, strict=True)]
    assert evaluate(task, "eval", 7)[0] == pytest.approx(sum(right) / 20)
    task.metric = METRICS["exact_match"]  # of the candidates' texts, of which some are equal to a right one
    assert evaluate(task, "eval", 7)[0] >= sum(right) / 20


@torch.no_grad()
def test_label_words_of_an_encoder_decoder(t5_dir: Path) -> None:
    model, tok = test_finetune.load(".", t5_dir, "prompt", ["animal", "fruit"])
    task = Spoken(
        model, tok, Frame(tok, "{text} Topic:", 32, encoder=True), 64, ["animal", "fruit"], ["big animal", "fruit"]
    )
    task.add("eval", test_finetune.TEXTS)
    logits = task.logits(task.batch("eval", range(40)))
    other = Choices(model, tok, task.frame, 64, [])
    rows = [Example((text,), ("big animal", "fruit"), (i,)) for text, i in zip(test_finetune.TEXTS.texts,
            test_finetune.TEXTS.targets, strict=True)]  # fmt: skip
    other.add("eval", data.TextSet([*rows], test_finetune.TEXTS.targets))
    assert torch.equal(logits, other.logits(other.batch("eval", range(40))))
    with pytest.raises(FinetuneError, match="--verbalizers: two labels have the same tokens"):
        Spoken(model, tok, task.frame, 64, ["animal", "fruit"], ["fruit", " fruit"])
    task.metric = METRICS["macro_f1"]  # its labels are classes
    assert 0 <= evaluate(task, "eval", 16)[0] <= 1
    with pytest.raises(FinetuneError, match="--metric token_f1 compares texts, and the labels are classes"):
        task.check_metric(METRICS["token_f1"])
    with pytest.raises(FinetuneError, match="--metric macro_f1 compares classes, and candidates are none"):
        other.check_metric(METRICS["macro_f1"])


@pytest.mark.parametrize("kind", ["gpt", "t5"])
def test_what_is_read_and_what_is_said_are_in_the_runs_hash(kind: str, models_dir: Path, t5_dir: Path) -> None:
    root, encoder = (t5_dir, True) if kind == "t5" else (models_dir / "gpt", False)
    model, tok = test_finetune.load(".", root, "choices", [])
    found = set()
    for template, candidates in [
        ("{text} is", ("fig", "pear")),
        ("{text} a", ("fig", "pear")),
        ("{text} is", ("fig", "lime")),
    ]:
        task = Choices(model, tok, Frame(tok, template, 32, encoder=encoder), 64, [])
        task.add("train", data.TextSet([Example(("cat",), candidates, (0,))], [0]))
        found.add(identity._of_tokens(task))
    assert len(found) == 3


# ---------------------------------------------------------------------------------------------------------------- labels


def read(path: Path, lines: list[dict[str, Any]], choices: str = "one,two,three") -> list[Example]:
    options = Options(data=written(path / "t.jsonl", lines), objective="choices", choices=choices)
    return [text for text, _ in data.read(options.data, options)[0].pairs]


LINE = {"text": "the cat", "one": "fig", "two": "plum", "three": "pear"}


@pytest.mark.parametrize("label", [1, 1.0, "1", "plum", "two", [1], ["plum"]])
def test_the_right_one_is_named_by_place_text_or_column(label: Any, tmp_path: Path) -> None:
    assert read(tmp_path, [{**LINE, "label": label}]) == [Example(("the cat",), ("fig", "plum", "pear"), (1,))]


def test_several_right_ones_equal_texts_and_fewer_candidates(tmp_path: Path) -> None:
    found = read(tmp_path, [
        {**LINE, "label": ["pear", 0]}, {**LINE, "two": "fig", "label": 0}, {**LINE, "three": "", "label": "two"},
        {**LINE, "label": -1}, {**LINE, "label": ""}, {**LINE, "two": "", "three": None, "label": 0},
    ])  # fmt: skip
    assert [(len(text.candidates), text.right) for text in found] == [(3, (0, 2)), (3, (0, 1)), (2, (1,))]
    lists = read(tmp_path, [{"text": "x", "all": ["a", 2, "b"], "label": "b"}], "all")
    assert lists == [Example(("x",), ("a", "2", "b"), (2,))]


@pytest.mark.parametrize(
    ("line", "choices", "message"),
    [
        (
            {**LINE, "label": 3},
            "one,two,three",
            r"line 1: column 'label' has 3; the right one .* \(0 to 2\)",
        ),
        ({**LINE, "label": True}, "one,two,three", "column 'label' has True; the right one"),
        (
            {**LINE, "one": "1", "label": "1"},
            "one,two,three",
            "'1', which is a candidate's place and another one's text",
        ),
        ({**LINE, "two": "", "label": 0}, "one,two,three", "line 1: candidate 1 of --choices one,two,three is empty"),
        ({**LINE, "label": 0}, "one", "column 'one' has 'fig'; --choices with one column needs a list"),
        (
            {**LINE, "one": ["a", {}], "label": 0},
            "one",
            "where a list of texts is needed; choose another with --choices",
        ),
        ({**LINE, "label": 0}, "one,four", "no column 'four'; the columns are .* Choose one with --choices"),
    ],
)
def test_choices_that_do_not_fit(line: dict[str, Any], choices: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match=message):
        read(tmp_path, [line], choices)


# ------------------------------------------------------------------------------------------------------------------ runs


def lines(count: int = 30) -> list[dict[str, Any]]:
    return [{**LINE, "text": f"the {ANIMALS[i % 6]} {i}", "label": i % 3} for i in range(count)]


def test_runs_count_what_is_left_out_and_go_on(models_dir: Path, t5_dir: Path, tmp_path: Path) -> None:
    rows = lines()
    rows[0]["label"], rows[1] = -1, {"text": "cat", "one": "fig", "two": "", "three": "", "label": 0}
    options = Options(
        data=written(tmp_path / "t.jsonl", rows), output=tmp_path / "out", steps=2, eval_every=0, batch_size=4,
        max_length=32, device="cpu", threads=1, template="{text} is", choices="one,two,three", force=True,
    )  # fmt: skip
    for model in (models_dir / "gpt", t5_dir):
        options.model = str(model)
        summary = finetune(options)
        run = json.loads((options.output / "run.json").read_text())
        assert (summary.objective, run["data"]["labels"]) == ("choices", [])
        assert run["data"]["left_out"]["train"] == {"no label": 1, "no choice": 1}
        assert run["summary"]["accuracy_after"] == summary.result.accuracy[1]
    options.steps, options.objective = 3, "prompt"
    with pytest.raises(FinetuneError, match="--choices is 'one,two,three', and the objective is prompt"):
        finetune(options)
    options.objective, options.choices = "choices", None
    with pytest.raises(FinetuneError, match="--choices is missing, and the objective is choices"):
        finetune(options)
    options.choices, options.max_length = "one,two,three", 64
    options.model = str(models_dir / "gpt")
    with pytest.raises(FinetuneError, match=r"--max-length is 64; allowed: at most 63, .* the prompt has up to 1"):
        finetune(options)


def test_a_decoder_that_does_not_know_how_to_begin_is_told(t5_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(t5_dir, tmp_path / "t5")
    for name in ("config.json", "generation_config.json"):
        kept = json.loads((tmp_path / "t5" / name).read_text())
        (tmp_path / "t5" / name).write_text(json.dumps({**kept, "decoder_start_token_id": None}))
    with pytest.raises(
        FinetuneError, match=r"T5ForConditionalGeneration's decoder cannot begin .*decoder_start_token_id"
    ):
        task_of(".", tmp_path / "t5", encoder=True)
