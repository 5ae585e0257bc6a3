"""Adapters with choices and answers: runs, once more, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from tests.finetune import test_choices, test_finetune, test_images  # noqa: E402
from tests.finetune.calling import at_call  # noqa: E402
from tests.finetune.test_adapters import same  # noqa: E402
from tests.finetune.test_columns import written  # noqa: E402
from tests.finetune.test_finetune import command, records  # noqa: E402
from tests.finetune.test_resuming import no_pictures, resume  # noqa: E402, F401
from zokern.finetune import FinetuneError, Options, finetune, run, tasks, writing  # noqa: E402
from zokern.finetune.tasks import evaluate  # noqa: E402

models_dir, t5_dir, vit = test_finetune.models_dir, test_choices.t5_dir, test_images.vit
ANIMALS, FRUITS = test_finetune.ANIMALS, test_finetune.FRUITS
VIRTUAL = 3
CASES = [
    ("lora", "gpt", "answer"),
    ("lora", "t5", "choices"),
    ("prompt", "gpt", "answer"),
    ("prefix", "gpt", "choices"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Texts of different lengths, with a label, a second text, candidates and answers each."""
    made = [
        {
            "text": f"{'the big ' * (i % 4)}{ANIMALS[i % 6]} {i}", "second": f"a {FRUITS[i % 6]}", "label": i % 2,
            "right": i % 2, "options": [f"a {FRUITS[i % 6]}", "the dog", "big"][: 2 + i % 2],
            "answers": [" ".join(FRUITS[: 1 + i % 3]), "kiwi"],
        } for i in range(30)
    ]  # fmt: skip
    return written(tmp_path_factory.mktemp("rows") / "rows.jsonl", made)


@pytest.fixture
def options(models_dir: Path, rows: str, tmp_path: Path) -> Options:
    return Options(
        model=str(models_dir / "gpt"), data=rows, output=tmp_path / "out", steps=6, batch_size=4, log_every=2, eval_every=3,
        max_length=16, max_answer=4, device="cpu", threads=1, template="{text} is",
    )  # fmt: skip


def case(options: Options, kind: str, model: str, objective: str, roots: dict[str, Path]) -> Options:
    """The options of a kind of adapter, a model and an objective."""
    more: dict[str, Any] = (
        {"choices": "options", "label_column": "right"} if objective == "choices" else {"answer": "answers"}
    )
    tokens = {} if kind == "lora" else {"adapter_tokens": VIRTUAL}
    return dataclasses.replace(options, model=str(roots[model]), adapter=kind, **more, **tokens)


def quiet(*_: object) -> None:
    """Says nothing."""


@pytest.mark.parametrize(("kind", "model", "objective"), CASES)
def test_a_run_its_adapter_its_replay_and_its_second_half(
    kind: str, model: str, objective: str, options: Options, models_dir: Path, t5_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given = case(options, kind, model, objective, {"gpt": models_dir / "gpt", "t5": t5_dir})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty answers
        summary = finetune(given)
        saved, end = summary.output.checkpoint, (summary.result.accuracy[1], summary.result.loss[1])
        assert (summary.objective, summary.metric) == (objective, "token_f1" if objective == "answer" else "accuracy")
        named = [record.get("metric", "accuracy") for record in records(given.output) if record["kind"] == "eval"]
        assert set(named) == {summary.metric}
        again = dataclasses.replace(
            given, model=str(saved), adapter=None, adapter_tokens=None, output=tmp_path / "more"
        )
        assert evaluate(run.load(again, quiet).task, "eval", 64) == end
        assert finetune(again).result.loss[0] == end[1]  # trained on, as it was left

        code, told = command("replay", given.model, summary.output.journal, "-o", tmp_path / "replayed")
        assert (code, same(saved, tmp_path / "replayed")) == (0, True), told

        cut = dataclasses.replace(given, output=tmp_path / "cut")

        def out_of_memory() -> None:
            raise MemoryError("in a forward")

        with monkeypatch.context() as patch:
            at_call((tasks.Task, "aim"), 8, out_of_memory, patch)
            with pytest.raises(MemoryError):
                finetune(cut)
        assert "resumed" in resume(cut, "--metric", summary.metric, *(("--adapter-rank", 8) if kind == "lora" else ()))
    assert same(saved, cut.output / "checkpoint")
    lines = [[{k: v for k, v in one.items() if k != "seconds"} for one in records(at.output)] for at in (given, cut)]
    assert lines[0] == lines[1]


def test_scores_are_those_of_the_adapter_that_peft_loads(options: Options, models_dir: Path) -> None:
    given = case(options, "prefix", "gpt", "choices", {"gpt": models_dir / "gpt"})
    saved = finetune(dataclasses.replace(given, steps=2, eval_every=0)).output.checkpoint
    task = run.load(dataclasses.replace(given, model=str(saved), adapter=None, adapter_tokens=None), quiet).task
    batch = task.batch("eval", range(6))
    ours = task.logits(batch)
    base = transformers.AutoModelForCausalLM.from_pretrained(given.model)
    task.model = peft.PeftModel.from_pretrained(base, saved).eval()
    with torch.no_grad():
        assert torch.equal(task.logits(batch), ours)


def test_the_metric_of_a_batch_is_minimised_by_an_adapter(options: Options, models_dir: Path) -> None:
    """ES over LoRA's weights, no gradient: each forward writes answers."""
    given = case(options, "lora", "gpt", "answer", {"gpt": models_dir / "gpt"})
    given = dataclasses.replace(
        given, method="es", minimise="metric", metric="exact_match", eps=0.5, steps=2, eval_every=0
    )
    calls = []
    plain = writing.greedily
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(writing, "greedily", lambda *a, **n: calls.append(len(a[1])) or plain(*a, **n))
        summary = finetune(given)
    assert calls.count(4) >= summary.counters["forwards"] > 0
    train, held = (next(r for r in records(given.output) if r["kind"] == kind) for kind in ("train", "eval"))
    assert -1.0 <= train["loss"] <= 0.0 < held["loss"]
    assert (held["metric"], "accuracy" in held) == ("exact_match", False)
    assert json.loads((given.output / "run.json").read_text())["summary"]["metric"] == "exact_match"


def test_check_looks_at_answers_behind_virtual_tokens(options: Options, models_dir: Path) -> None:
    code, said = command(
        "finetune", "--check", "--model", models_dir / "gpt", "--data", options.data, "--adapter", "prompt", "--answer",
        "answers", "--max-length", 16, "--max-answer", 4, "--output", options.output, "--template", "{text} is",
    )  # fmt: skip
    assert (code, "1 tensors perturbed" in said) == (0, True), said
    assert not options.output.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapter_tokens": 61}, r"--adapter-tokens is 61; allowed: at most 60 for --model .* takes 64 tokens, of which"),
        ({"adapter_tokens": 500}, r"--adapter-tokens is 500; allowed: at most 60"),
        ({"max_length": 55}, r"--max-length is 55; allowed: at most 54 for .* beside its adapter's 10 virtual ones"),
        ({"max_length": 52}, r"at most 50, as the model takes 54 tokens beside its adapter's 10 virtual ones and what"),
        ({"max_length": 53, "answer": None}, r"at most 52, .*10 virtual ones and the longest label word has 2"),
    ],
)  # fmt: skip
def test_virtual_tokens_and_texts_share_the_room(given: dict[str, Any], message: str, options: Options) -> None:
    options = dataclasses.replace(options, adapter="prompt", answer="answers")
    if given.get("answer", "answers") is None:
        words = options.output.parent / "words.json"
        words.write_text('{"0": "big cat", "1": "the dog"}')
        options.verbalizers = words
    with pytest.raises(FinetuneError, match=message):
        finetune(dataclasses.replace(options, **given))
    assert not options.output.exists()


def test_answers_that_no_option_can_hold_are_told_so(
    options: Options, models_dir: Path, t5_dir: Path, tmp_path: Path
) -> None:
    data = written(tmp_path / "long.jsonl", [{"text": f"a {i}", "answers": "kiwi " * 70} for i in range(20)])
    for root, expected in (
        (models_dir / "gpt", "train: 16 of 16 answers are cut to 4 tokens; the longest has 71, the model takes 48 behind "
                             "--max-length"),
        (t5_dir, "train: 16 of 16 answers are cut to 4 tokens; the longest has 72, the model takes 64"),
    ):  # fmt: skip
        loaded = run.load(dataclasses.replace(options, model=str(root), data=data, answer="answers"), quiet)
        assert expected in loaded.data.notes


def test_numbers_as_words_are_told(options: Options, tmp_path: Path) -> None:
    """As of SST-2's own files, or of COPA where --choices is forgotten."""
    loaded = run.load(dataclasses.replace(options, adapter="lora"), quiet)
    told = [
        note for note in loaded.data.notes if "WARNING: the model is to say numbers, '0', '1', after --template" in note
    ]
    assert len(told) == 1
    (tmp_path / "words.json").write_text('{"0": "dog", "1": "cat"}')
    loaded = run.load(dataclasses.replace(options, verbalizers=tmp_path / "words.json"), quiet)
    assert not any("WARNING" in note for note in loaded.data.notes)


def test_pictures_have_no_adapters(vit: Path, tmp_path: Path, rows: str) -> None:
    options = Options(model=str(vit), data=rows, adapter="lora", output=tmp_path / "out")
    with pytest.raises(FinetuneError, match=r"--adapter lora does not serve --objective image: .* leave --adapter out"):
        finetune(options)  # which auto picks
    adapter = tmp_path / "adapter"
    base = transformers.AutoModelForImageClassification.from_pretrained(vit)
    base.name_or_path = str(vit)
    peft.get_peft_model(base, peft.LoraConfig(r=1, target_modules="all-linear")).save_pretrained(adapter)
    (adapter / "config.json").write_bytes((vit / "config.json").read_bytes())
    pictures = written(tmp_path / "p.jsonl", [{"image": f"{i}.png", "label": "ab"[i % 2]} for i in range(12)])
    for i in range(12):
        test_images.Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    with pytest.raises(FinetuneError, match=r"is an adapter of a model for pictures.*merge it into its base"):
        finetune(dataclasses.replace(options, model=str(adapter), adapter=None, data=pictures))
    assert not options.output.exists()


def test_an_adapter_of_another_head_or_task_is_refused_with_the_way_out(
    options: Options, models_dir: Path, t5_dir: Path, rows: str, tmp_path: Path
) -> None:
    pair = dataclasses.replace(
        options, model=str(models_dir / "bert"), adapter="lora", pair_column="second", steps=1, eval_every=0
    )
    summary = finetune(pair)
    assert summary.objective == "classifier"  # which auto picks for pairs, though the model has no head
    three = written(tmp_path / "three.jsonl", [{"text": f"a cat {i}", "label": "abc"[i % 3]} for i in range(30)])
    more = dataclasses.replace(pair, model=str(summary.output.checkpoint), adapter=None, data=three, pair_column=None)
    with pytest.raises(
        FinetuneError, match=r"an adapter whose head has 2 classes, '0', '1', and the data has 3 labels"
    ):
        finetune(dataclasses.replace(more, output=tmp_path / "no"))
    given = case(options, "lora", "t5", "choices", {"t5": t5_dir})
    saved = finetune(dataclasses.replace(given, steps=1, eval_every=0, force=True)).output.checkpoint
    more = dataclasses.replace(options, model=str(saved), objective="similarity", data=rows, output=tmp_path / "no")
    with pytest.raises(FinetuneError, match=r"is an adapter for SEQ_2_SEQ_LM, .*give --objective prompt"):
        finetune(more)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("objective", ["prompt", "choices", "answer"])
def test_a_model_that_sees_the_word_is_refused_where_it_is_asked_for(
    objective: str, options: Options, models_dir: Path
) -> None:
    more: dict[str, Any] = {"choices": {"choices": "options", "label_column": "right"}, "answer": {"answer": "answers"}}
    options = dataclasses.replace(
        options, model=str(models_dir / "bert"), objective=objective, **more.get(objective, {})
    )
    with pytest.raises(
        FinetuneError, match=f"--objective {objective} needs a language model; bert reads a text from both"
    ):
        finetune(options)
    assert not options.output.exists()
