"""--metric at evaluations, and as what a step makes smaller."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.finetune import test_answers, test_choices, test_finetune  # noqa: E402
from zokern.finetune import FinetuneError, Options, data, finetune  # noqa: E402
from zokern.finetune.tasks import evaluate  # noqa: E402
from zokern.tasks.metrics import named, token_f1  # noqa: E402

models_dir, table = test_finetune.models_dir, test_finetune.table


@pytest.fixture
def options(models_dir: Path, table: Path, tmp_path: Path) -> Options:
    return Options(
        model=str(models_dir / "gpt"), data=str(table), output=tmp_path / "out", steps=3, batch_size=8, log_every=1,
        eval_every=0, lr=1e-2, eps=1e-2, max_length=32, device="cpu", threads=1, force=True,
    )  # fmt: skip


def own(predictions: list[str], references: list[str]) -> float:
    """A metric of a user: how many are right, and an error where labels are not names."""
    assert set(references) <= {"animal", "fruit"}
    return 3.0 * sum(map(str.__eq__, predictions, references))


@pytest.mark.usefixtures("drawn")
def test_a_metric_by_name_and_a_users_own(options: Options, capsys: pytest.CaptureFixture) -> None:
    options.metric = "matthews"
    summary = finetune(options)
    assert summary.metric == "matthews"
    assert "held out  matthews" in capsys.readouterr().out
    options.metric = f"{__name__}:own"
    summary = finetune(options)
    said = capsys.readouterr().out
    score = summary.result.accuracy[1]
    assert score % 3 == 0
    assert score > 1
    assert f"own {summary.result.accuracy[0]:.4g} -> {score:.4g}" in said  # no per cent of a metric that is not ours
    assert json.loads((options.output / "run.json").read_text())["summary"]["score_after"] == score


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("f1", "--metric: there is no metric 'f1'; there are accuracy"),
        ("no_module:f", "--metric: the metric 'no_module:f' cannot be imported"),
        (
            "token_f1",
            "--metric token_f1 compares texts, and the labels are classes; take accuracy, macro_f1 or matthews",
        ),
    ],
)
def test_a_metric_that_is_not_there_or_does_not_fit(metric: str, message: str, options: Options) -> None:
    options.metric = metric
    with pytest.raises(FinetuneError, match=message):
        finetune(options)
    assert not options.output.exists()


def nothing(predictions: list[str], references: list[str]) -> None:
    """A metric that forgets to return."""


def breaks(predictions: list[str], references: list[str]) -> float:
    return {"right": 1.0}[predictions[0]]


def test_a_users_metric_that_raises(options: Options) -> None:
    options.metric = f"{__name__}:breaks"
    with pytest.raises(FinetuneError, match=r"--metric .*:breaks failed \(KeyError: "):
        finetune(options)


def test_a_users_metric_that_gives_no_number(options: Options) -> None:
    options.metric = f"{__name__}:nothing"
    with pytest.raises(
        FinetuneError, match=r"--metric .*:nothing: the metric .* gave None; it has to return a finite number"
    ):
        finetune(options)
    assert not options.output.exists()


def minus(task: Any, batch: Any, wanted: list[int]) -> float:
    right = (task.logits(batch).argmax(1) == torch.tensor([task.sets["eval"][1][i] for i in wanted])).sum()
    return -float(right) / len(wanted)


@torch.no_grad()
def test_what_is_minimised_is_minus_the_metric(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tok = test_finetune.load("classifier", models_dir, "classifier", ["animal", "fruit"])
    task = test_finetune.tasks.Classifier(model, tok, ["animal", "fruit"], 32)
    task.add("eval", test_finetune.TEXTS)
    wanted = [3, 1, 20, 7, 30]
    batch = task.batch("eval", wanted)
    assert task.aim(batch) == task.loss(batch)
    task.by_metric = True
    assert task.aim(batch).item() == pytest.approx(minus(task, batch, wanted))
    task.metric = named("macro_f1")
    assert -1 <= task.aim(batch).item() <= 0
    answers = test_answers.task_of("gpt", models_dir)
    texts = test_answers.examples(6)
    answers.add("train", data.TextSet([*texts], [0] * 6))
    answers.by_metric = True
    monkeypatch.setattr(answers, "scores", lambda batch: pytest.fail("a forward that nobody needs"))
    monkeypatch.setattr(answers, "written", lambda prompts: ["fig"] * len(prompts))
    expected = token_f1(["fig"] * 4, [list(texts[i].answers) for i in (5, 0, 1, 2)])
    assert answers.aim(answers.batch("train", [5, 0, 1, 2])).item() == pytest.approx(-expected)


def test_a_run_over_the_metric(options: Options, capsys: pytest.CaptureFixture) -> None:
    options.minimise, options.eps = "metric", 0.1  # accuracy takes some steps to one side, and some to the other
    finetune(options)
    assert "minus accuracy is minimised" in capsys.readouterr().out
    records = test_finetune.records(options.output)
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert all(-1 <= loss <= 0 and (16 * loss) % 1 == 0 for loss in losses)  # of two forwards of 8 texts
    assert any(record["projected_gradient"] for record in records if record["kind"] == "train")
    assert all(record["loss"] > 0 for record in records if record["kind"] == "eval")


@torch.no_grad()
def test_candidates_are_measured_by_their_texts_too(models_dir: Path) -> None:
    task = test_choices.task_of("gpt", models_dir)
    texts = test_choices.examples()
    task.add("eval", data.TextSet([*texts], [text.right[0] for text in texts]))
    accuracy, loss = evaluate(task, "eval", 8)
    for name in ("exact_match", "token_f1"):
        task.measure(named(name))
        score, again = evaluate(task, "eval", 8)
        assert accuracy <= score <= 1
        assert again == loss
