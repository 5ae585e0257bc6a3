"""The order of the classes: a published head keeps its own, and the run says which was taken."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from tests.finetune.test_finetune import tokenizer  # noqa: E402
from zokern.finetune import FinetuneError, Options, finetune  # noqa: E402
from zokern.finetune.labels import doubtful, lost_head, order  # noqa: E402

NLI = {"CONTRADICTION": 0, "NEUTRAL": 1, "ENTAILMENT": 2}
NAMELESS = {f"LABEL_{i}": i for i in range(3)}
OWN = ["world", "sports", "business"]


def taken(found: str, **given: Any) -> list[str]:
    return order(set(found.split()), given.pop("own", None), given.pop("label2id", None), head=True, **given).labels


@pytest.mark.parametrize(
    ("found", "given", "labels", "said"),
    [
        ("contradiction entailment neutral", {"label2id": NLI}, "contradiction neutral entailment", "the model's own"),
        ("b a", {"label2id": {"B": 0, "A": 1}}, "b a", "the model's own"),
        ("ab a-b", {"label2id": {"A_B": 0, "AB": 1}}, "a-b ab", "the model's own"),
        ("entailment neutral", {"label2id": NLI}, "CONTRADICTION neutral entailment", "no training text has 'CONTRA"),
        ("business world sports", {"label2id": NAMELESS, "own": OWN}, "world sports business", "data set's own; the head"),
        ("business world", {"label2id": NAMELESS, "own": OWN}, "world sports business", "data set's own; the head"),
        ("business world sports", {"label2id": NAMELESS}, "business sports world",
         "sorted: 0 = business, 1 = sports, 2 = world. WARNING: the head does"),
        ("business world sports", {"label2id": NLI}, "business sports world", "WARNING: the head names its classes"),
        ("business world sports", {"label2id": NLI, "own": OWN}, "world sports business", "WARNING: the head names"),
        ("0 1 2", {"label2id": NAMELESS}, "0 1 2", "the numbers of the head's classes"),
        ("0 1 2", {"label2id": NLI}, "CONTRADICTION NEUTRAL ENTAILMENT", "the head's classes, which it names"),
        ("1 2 3", {"label2id": NLI}, "1 2 3", "sorted: 0 = 1, 1 = 2, 2 = 3. WARNING"),
        ("x y", {"label2id": NLI}, "x y", "sorted"),
        ("x y", {"label2id": NLI, "own": ["y", "z", "x"]}, "y z x", "WARNING: the head names"),
        ("10 9 -1", {}, "-1 9 10", "sorted"),
        ("business world sports", {"own": OWN}, "world sports business", "the data set's own"),
        ("business world sports", {"label2id": NAMELESS, "asked": "sports, world ,business"}, "sports world business",
         "as --label-order says"),
    ],
)  # fmt: skip
def test_which_order_is_taken(found: str, given: dict, labels: str, said: str) -> None:
    classes = order(set(found.split()), given.get("own"), given.get("label2id"), head=True, asked=given.get("asked"))
    assert classes.labels == labels.split()
    assert said in classes.said


def test_a_head_that_is_lost_is_told_with_the_rows_of_each_label() -> None:
    rows = {"five": 30, "Five": 1, "one": 29}
    classes = order(set(rows), None, {"one": 0, "five": 1}, head=True)
    assert lost_head(classes, rows) == (
        "WARNING: the trained head is lost, and a new one is drawn at random. The head has 2 classes, 'one', 'five'; the "
        "data has 3 labels: 'Five' (1 row), 'five' (30 rows), 'one' (29 rows)"
    )
    assert order({"x", "y"}, None, NLI, head=True, asked="y,x").lost == list(NLI)
    assert [order({"x", "y"}, None, NLI, head=False).lost, order(set(NLI), None, NLI, head=True).lost] == [None, None]
    many = {f"topic {i}": 7 for i in range(20)}
    assert lost_head(order(set(many), None, NLI, head=True), many).endswith("the data has 20 labels")


def test_labels_that_may_be_mistyped_are_named() -> None:
    assert doubtful({"five": 30, "Five": 1, "one": 29, " Five ": 2}) == [
        "WARNING: labels that differ only by case or blanks: ' Five ' (2 rows), 'Five' (1 row), 'five' (30 rows)"
    ]
    assert doubtful({"five": 30, "fiev": 1, "one": 29}) == ["WARNING: a label of one row alone: 'fiev'"]
    assert doubtful({"five": 30, "fiev": 1, "eno": 1}) == ["WARNING: labels of one row alone: 'eno', 'fiev'"]
    assert doubtful({"1": 30, "-1": 29, "a b": 2, "a-b": 2}) == []


def test_a_mistyped_label_costs_a_published_head_and_says_so(
    head: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "nli.csv"
    with path.open("w", newline="") as file:
        rows = [("text", "label"), ("cat 0", "Entailment"), *((f"{text} {i}", c) for i, (text, c) in enumerate(TEXTS))]
        csv.writer(file).writerows(rows)
    options = Options(model=str(head), data=str(path), output=tmp_path / "out", steps=1, lr=0.0, batch_size=8,
                      max_length=16, device="cpu", threads=1)  # fmt: skip
    finetune(options)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "WARNING: labels that differ only by case or blanks: 'Entailment' (1 row), 'entailment' (60 rows)" in lines
    assert any(line.startswith("WARNING: the trained head is lost, and a new one is drawn") for line in lines)


def test_without_a_trained_head_only_equal_names_count() -> None:
    assert order({"x", "y"}, None, {"LABEL_0": 0, "LABEL_1": 1}, head=False).said == "sorted"
    assert order({"entailment", "neutral"}, None, NLI, head=False).labels == ["entailment", "neutral"]


@pytest.mark.parametrize(("asked", "message"), [("a,b", "it lacks 'c'"), ("a,b,c,a", "it has one twice")])
def test_an_asked_order_has_each_label_once(asked: str, message: str) -> None:
    with pytest.raises(FinetuneError, match=message):
        taken("a b c", asked=asked)


# ----------------------------------------------------------------------------------- a trained head, measured with lr 0

TEXTS = [(" ".join([word] * (1 + i % 3)), label) for i in range(60)
         for word, label in (("cat", "entailment"), ("fig", "neutral"), ("big", "contradiction"))]  # fmt: skip


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that knows its words: CONTRADICTION, NEUTRAL, ENTAILMENT."""
    path = tmp_path_factory.mktemp("head")
    tok = tokenizer(True)
    config = transformers.BertConfig(
        vocab_size=len(tok), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, num_labels=3, id2label={i: name for name, i in NLI.items()}, label2id=NLI,
        initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    words = [("cat", 2), ("fig", 1), ("big", 0)]
    texts = [" ".join([word] * (1 + i % 3)) + f" {i}" for word, _ in words for i in range(0, 180, 9)]
    batch = tok(texts, padding=True, return_tensors="pt")
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(**batch, labels=torch.tensor([c for _, c in words for _ in range(20)])).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    model.save_pretrained(path)
    tok.save_pretrained(path)
    return path


def nameless(head: Path, path: Path) -> Path:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(head)
    model.config.id2label, model.config.label2id = dict(enumerate(NAMELESS)), NAMELESS
    model.save_pretrained(path)
    tokenizer(True).save_pretrained(path)
    return path


def accuracy(model: Path, data: Path, tmp_path: Path, **more: Any) -> tuple[float, list[str], str]:
    """Of the head as it is; the names in the saved configuration; what run.json says of the order."""
    options = Options(
        model=str(model), data=str(data), output=tmp_path / "out", steps=1, lr=0.0, batch_size=8, eval_every=0,
        max_length=16, device="cpu", threads=1, force=True,
    )  # fmt: skip
    summary = finetune(dataclasses.replace(options, **more))
    saved = json.loads((summary.output.checkpoint / "config.json").read_text())
    run = json.loads((options.output / "run.json").read_text())
    assert [saved["id2label"][str(i)] for i in range(3)] == run["data"]["labels"]
    said = next(note for note in run["data"]["notes"] if note.startswith("order of the labels"))
    return summary.result.accuracy[0], run["data"]["labels"], said


def test_a_published_heads_order_wins(head: Path, tmp_path: Path) -> None:
    path = tmp_path / "nli.csv"
    for change in (str.upper, str.lower, str.title):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(
                [("text", "label"), *((f"{text} {i}", change(c)) for i, (text, c) in enumerate(TEXTS))]
            )
        right, labels, said = accuracy(head, path, tmp_path)
        assert right > 0.9
        assert labels == [change(name) for name in NLI]
        assert said.endswith("the model's own")


def test_a_nameless_head_takes_the_data_sets_order(head: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = nameless(head, tmp_path / "model")
    own = ["contradiction", "neutral", "entailment"]
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=own))
    rows = {"text": [f"{text} {i}" for i, (text, _) in enumerate(TEXTS)], "label": [own.index(c) for _, c in TEXTS]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "nli.parquet")
    right, labels, said = accuracy(model, tmp_path / "nli.parquet", tmp_path)
    assert (right > 0.9, labels) == (True, own)
    assert "the data set's own" in said
    assert said in capsys.readouterr().out


def test_the_advice_for_a_nameless_head_and_a_plain_file_works(head: Path, tmp_path: Path) -> None:
    model, path = nameless(head, tmp_path / "model"), tmp_path / "nli.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((f"{text} {i}", c) for i, (text, c) in enumerate(TEXTS))])
    right, _, said = accuracy(model, path, tmp_path)
    assert right < 0.5
    assert "WARNING" in said
    assert "--label-order" in said
    right, labels, said = accuracy(model, path, tmp_path, label_order="contradiction,neutral,entailment")
    assert (right > 0.9, labels) == (True, ["contradiction", "neutral", "entailment"])
    assert said.endswith("as --label-order says")
