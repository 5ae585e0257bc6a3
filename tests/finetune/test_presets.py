"""Every preset on small files in the benchmark's own form and on rows as the hub has them, and two steps of each."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from tests.finetune import test_finetune  # noqa: E402
from tests.finetune.test_columns import Marking  # noqa: E402
from tests.finetune.test_fitting import byte_level  # noqa: E402
from zokern.finetune import FinetuneError, Options, data, finetune, preset  # noqa: E402
from zokern.finetune.preset import PRESETS  # noqa: E402

models_dir = test_finetune.models_dir
N = 6


def truth(i: int) -> bool:
    return i % 2 == 0


OWN: dict[str, Any] = {  # as the benchmarks publish them: the i-th object of a file
    "rte": lambda i: {"premise": f"Tom sang {i}.", "hypothesis": "Tom made a sound.",
                      "label": ["entailment", "not_entailment"][i % 2], "idx": i},
    "cb": lambda i: {"premise": f"A: Did Tom sing {i}? B: Yes.", "hypothesis": "Tom sang",
                     "label": ["entailment", "contradiction", "neutral"][i % 3], "idx": i},
    "boolq": lambda i: {"question": f"is {i} even", "passage": f"{i} is a number.", "idx": i, "label": truth(i)},
    "wsc": lambda i: {"text": f"Mark told Pete he was {i}, and he went.", "idx": i, "label": truth(i),
                      "target": {"span1_index": 0, "span1_text": "Mark", "span2_index": 7, "span2_text": "he"}},
    "wic": lambda i: {"word": "place", "sentence1": f"Place {i}.", "sentence2": "A place.", "idx": i, "label": truth(i),
                      "start1": 0, "start2": 2, "end1": 5, "end2": 7, "version": 1.1},
    "multirc": lambda i: {"idx": i, "version": 1.1, "passage": {"text": f"Tom is {i}.", "questions": [
        {"question": f"Who is {i}?", "idx": 0, "answers": [{"text": "Tom", "idx": 0, "label": 1},
                                                           {"text": "Ann", "idx": 1, "label": 0}]}]}},
    "copa": lambda i: {"premise": f"Tom sang {i}.", "choice1": "I was glad.", "choice2": "The dog ran.", "idx": i,
                       "question": ["cause", "effect"][i % 2], "label": i % 2},
    "record": lambda i: {"source": "x", "idx": i, "passage": {"text": f"Tom met Ann {i}.\n@highlight\nThey sang.",
                         "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}]},
                         "qas": [{"query": "@placeholder was met.", "idx": 0,
                                  "answers": [{"start": 8, "end": 10, "text": "Ann"}]}]},
}  # fmt: skip
HUB: dict[str, Any] = {  # where the hub's rows are others: the label is the class's number there
    **{name: (lambda i, name=name: {**OWN[name](i), "label": i % 2 if name != "cb" else i % 3}) for name in ("rte", "cb")},
    **{name: (lambda i, name=name: {**OWN[name](i), "label": int(truth(i))}) for name in ("boolq", "wic")},
    "copa": OWN["copa"],
    "wsc": lambda i: {"text": OWN["wsc"](i)["text"], "label": int(truth(i)), **OWN["wsc"](i)["target"]},
    "multirc": lambda i: {"paragraph": f"Tom is {i // 2}.", "question": f"Who is {i // 2}?",
                          "answer": "Ann" if i % 2 else "Tom", "idx": {"paragraph": i, "question": 0, "answer": 0},
                          "label": 1 - i % 2},
    "record": lambda i: {"passage": OWN["record"](i)["passage"]["text"], "query": "@placeholder was met.",
                         "entities": ["Tom", "Ann"], "answers": ["Ann"]},
    "squad": lambda i: {"id": str(i), "title": "x", "context": f"Tom is {i}.", "question": f"Who is {i}?",
                        "answers": {"text": ["Tom", "Tom"], "answer_start": [0, 0]}},
    "drop": lambda i: {"section_id": "x", "query_id": str(i), "passage": f"Tom ran {i} miles.", "question": "How far?",
                       "answers_spans": {"spans": [f"{i} miles"], "types": ["span"]}},
    "sst2": lambda i: {"idx": i, "sentence": f"film {i}", "label": i % 2},
}  # fmt: skip


def write(task: str, folder: Path) -> Path:
    """A directory as the benchmark has it: a part to train on, one to evaluate on, and a test set without labels."""
    folder.mkdir()
    if task == "sst2":
        for part in ("train", "dev"):
            lines = [f'{part} {i} "a" film\t{i % 2}\n' for i in range(N)]
            (folder / f"{part}.tsv").write_text("sentence\tlabel\n" + "".join(lines))
        (folder / "test.tsv").write_text("index\tsentence\n0\tfilm\n")
    elif task == "squad":
        for part in ("train", "dev"):
            asked = [{"id": str(i), "question": f"Who is {part} {i}?", "answers": [] if i == 5 else [
                      {"text": "Tom", "answer_start": 0}, {"text": "he", "answer_start": 4}]}
                      for i in range(N)]  # fmt: skip
            whole = {
                "version": "2.0",
                "data": [{"title": "x", "paragraphs": [{"context": "Tom is he.", "qas": asked}]}],
            }
            (folder / f"{part}-v2.0.json").write_text(json.dumps(whole, indent=1))
    elif task == "drop":
        none: dict[str, Any] = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": []}
        answers = [{**none, "number": "3"}, {**none, "date": {"day": "2", "month": "May", "year": "1990"}},
                   {**none, "spans": ["Tom", "Ann"]}]  # fmt: skip
        for part in ("train", "dev"):
            asked = [{"question": f"{part} {i}?", "answer": answers[i % 3], "validated_answers": [{**none, "number": "4"}],
                      "query_id": str(i)} for i in range(N)]  # fmt: skip
            whole = {"nfl_1": {"passage": "Tom ran.", "wiki_url": "x", "qa_pairs": asked}}
            (folder / f"drop_dataset_{part}.json").write_text(json.dumps(whole))
    else:
        for k, part in enumerate(("train", "val")):
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(OWN[task](i + N * k)) + "\n" for i in range(N)))
        bare = {name: value for name, value in OWN[task](0).items() if name != "label"}
        (folder / "test.jsonl").write_text(json.dumps(bare) + "\n")
    return folder


FIRST = {  # what the first row says: the texts of the prompt, and what is right
    "sst2": (('train 0 "a" film',), "negative"),
    "rte": (("Tom sang 0.", "Tom made a sound."), "entailment"),
    "cb": (("A: Did Tom sing 0? B: Yes.", "Tom sang"), "entailment"),
    "boolq": (("0 is a number.", "is 0 even"), "True"),
    "wsc": (("Mark told Pete he was 0, and *he* went.", "*he*", "Mark"), "True"),
    "wic": (("Place 0.", "A place.", "place"), "True"),
    "multirc": (("Tom is 0.", "Who is 0?", "Tom"), "True"),
    "copa": (("Tom sang 0", "because"), (("I was glad.", "the dog ran."), (0,))),
    "record": (("Tom met Ann 0.\n- They sang.", "@placeholder was met."), (("Tom", "Ann"), (1,))),
    "squad": (("Tom is he.", "Who is train 0?"), ("Tom", "he")),
    "drop": (("Tom ran.", "train 0?"), ("3", "4")),
}


def read(task: str, where: str, **more: Any) -> tuple[Any, Any]:
    options = preset.applied(Options(task=task, data=where, **more))
    own = "choices" if options.choices else "answer" if options.answer else "prompt"
    options.objective = own
    return data.read(options.data, options)


@pytest.mark.parametrize("task", PRESETS)
def test_own_files_are_read(task: str, tmp_path: Path) -> None:
    train, held = read(task, str(write(task, tmp_path / task)))
    each = 2 if task == "multirc" else 1
    assert len(train.pairs) == len(held.pairs) == N * each - (task == "squad")
    text, label = train.pairs[0]
    parts, right = FIRST[task]
    assert (text if isinstance(text, str) else text.parts) == (parts[0] if task == "sst2" else parts)
    own = {"copa", "record"}
    assert right == (label or ((text.candidates, text.right) if task in own else text.answers))
    assert {pair[0] for pair in train.pairs}.isdisjoint(pair[0] for pair in held.pairs)
    if task == "drop":
        assert [text.answers[0] for text, _ in train.pairs[:3]] == ["3", "2 May 1990", "Tom, Ann"]
    if task == "squad":
        assert train.left_out.first == {"no answer": f"{tmp_path}/squad/train-v2.0.json, question 6"}
    elif task not in ("sst2", "drop"):
        test, _ = read(task, str(tmp_path / task / "test.jsonl"))
        assert len(test.pairs) == (
            1 if task == "record" else 2 if task == "multirc" else 0
        )  # those of theirs keep labels here
        assert len(test.pairs) or test.left_out.counts == {"no label": 1}


@pytest.mark.parametrize("task", PRESETS)
def test_rows_of_the_hub_are_the_same(task: str, tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list([HUB[task](i + k) for i in range(2 * N)]) for k, name in
             enumerate(("train", "validation"))}  # fmt: skip
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "hub")
    train, held = read(task, str(tmp_path / "hub"))
    assert len(train.pairs) == len(held.pairs) == 2 * N
    text, label = train.pairs[0]
    if task not in ("sst2", "squad", "drop"):
        ours, _ = read(task, str(write(task, tmp_path / task)))
        assert (text, label) == ours.pairs[0]
    else:
        assert (
            label == "negative" if task == "sst2" else text.answers == (("Tom",) if task == "squad" else ("0 miles",))
        )


@pytest.fixture(scope="session")
def bytes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder that reads any text."""
    root = tmp_path_factory.mktemp("bytes")
    tokenizer = copy.deepcopy(byte_level())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256,
                                         bos_token_id=None, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
        transformers.GPT2LMHeadModel(config).save_pretrained(root)
    tokenizer.save_pretrained(root)
    return root


@pytest.mark.filterwarnings("ignore:.* answers that the model wrote are empty")
@pytest.mark.parametrize("task", PRESETS)
def test_two_steps_of_each(task: str, bytes_dir: Path, tmp_path: Path) -> None:
    where = write(task, tmp_path / task)
    options = Options(model=str(bytes_dir), task=task, data=str(where), output=tmp_path / "out", steps=2, batch_size=4,
                      max_answer=6, eval_every=0, max_length=140, device="cpu", threads=1)  # fmt: skip
    summary = finetune(options)
    assert summary.result.steps == 2
    assert summary.metric == PRESETS[task].metric
    stored = json.loads((options.output / "options.json").read_text())
    assert (stored["task"], stored["template"]) == (task, Options().template)  # as the user has given them
    said = json.loads((options.output / "run.json").read_text())
    assert said["data"]["labels"] == list(PRESETS[task].words)


def test_a_classifier_takes_what_it_can(models_dir: Path, tmp_path: Path) -> None:
    model, _ = test_finetune.load("classifier", models_dir, "classifier", ["animal", "fruit"])
    model.save_pretrained(tmp_path / "bert")
    Marking().save_pretrained(tmp_path / "bert")
    options = Options(model=str(tmp_path / "bert"), output=tmp_path / "out", steps=1, batch_size=4, eval_every=0,
                      device="cpu", threads=1, force=True)  # fmt: skip
    for task in ("sst2", "multirc"):
        options.task, options.data = task, str(write(task, tmp_path / task))
        assert finetune(options).objective == "classifier"
    options.task, options.data = "copa", str(write("copa", tmp_path / "copa"))
    with pytest.raises(
        FinetuneError, match="--objective choices needs a language model; bert reads a text from both its sides"
    ):
        finetune(options)
    options.objective = "classifier"
    with pytest.raises(FinetuneError, match="--task copa cannot be done with --objective classifier"):
        finetune(options)


def test_what_is_given_besides_wins() -> None:
    options = preset.applied(Options(task="boolq"))
    assert (options.data, options.cut) == ("aps/super_glue:boolq", "passage")
    options = preset.applied(Options(task="boolq", template="{question}? Answer:", data="x.jsonl"))
    assert (options.data, options.cut, options.template) == ("x.jsonl", None, "{question}? Answer:")
    assert preset.applied(Options(task="squad", metric="exact_match")).metric == "exact_match"
    assert preset.applied(plain := Options()) is plain
    mine = Options(task="rte", objective="classifier", text_column="hypothesis", pair_column="premise")
    assert preset.for_objective(mine) is mine
    theirs = preset.for_objective(preset.applied(Options(task="boolq", objective="classifier")))
    assert (theirs.text_column, theirs.pair_column, theirs.cut) == ("question", "passage", "passage")
    theirs = preset.for_objective(preset.applied(Options(task="wsc", objective="classifier", cut="name")))
    assert (theirs.pair_column, theirs.cut) == ("name", "name")


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        (
            "rte",
            {"premise": "x", "label": 0},
            r"line 1: it has no 'hypothesis', but 'premise', 'label'\. --task rte reads",
        ),
        (
            "cb",
            {"premise": "x", "hypothesis": "y", "label": "maybe"},
            "line 1: 'label' is 'maybe'; the classes are entail",
        ),
        ("boolq", {"passage": "x", "question": "y", "label": 2}, "'label' is 2; the classes are False, True"),
        ("copa", {**OWN["copa"](0), "question": "why"}, "'question' is 'why'; it is cause or effect"),
        ("multirc", {"passage": "x"}, "an object with 'questions' is needed, this is 'x'"),
        ("record", {"passage": {"text": "x"}}, "it has no 'entities'"),
        ("squad", {"answers": []}, "it has no 'data'"),
    ],
)
def test_data_of_another_form(task: str, line: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(FinetuneError, match=message):
        read(task, str(tmp_path / "t.jsonl"))


def test_a_directory_that_is_not_clear(tmp_path: Path) -> None:
    folder = write("rte", tmp_path / "rte")
    options = preset.applied(Options(task="rte", data=str(folder), objective="prompt"))
    with pytest.raises(FinetuneError, match=r"--split is 'train', but .* has files; give one by --data"):
        data.read(options.data, options, "train")
    (folder / "train.tsv").write_text("premise\thypothesis\tlabel\n")
    with pytest.raises(FinetuneError, match=r"has several files of one part: train\.jsonl, train\.tsv; give one"):
        read("rte", str(folder))
