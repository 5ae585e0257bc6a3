"""Three held-out texts before and after: what is said of them is what the model says of each alone."""

# ruff: noqa: F811 - fixtures of another file

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from rich.console import Console

from tests.finetune.test_finetune import models_dir, options, table  # noqa: F401
from zokern.finetune import Options, finetune, samples
from zokern.finetune import run as runs


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (10, [0, 3, 6]), (400, [0, 133, 266])]
)
def test_places_lie_apart(count: int, expected: list[int]) -> None:
    assert samples.places(count) == expected


@pytest.mark.parametrize(("model", "objective"), [("classifier", "classifier"), ("gpt", "prompt")])
def test_samples_are_what_the_model_says(
    model: str,
    objective: str,
    options: Options,
    models_dir: Path,
    tmp_path: Path,
) -> None:
    options = dataclasses.replace(options, model=str(models_dir / model), objective=objective)
    summary = finetune(options)
    again = dataclasses.replace(options, model=str(summary.output.checkpoint), output=tmp_path / "again")
    loaded = runs.load(again, functools.partial(runs.line, Console(quiet=True)))
    stored = json.loads((options.output / "run.json").read_text())["samples"]
    assert len(stored) == samples.COUNT
    assert stored == summary.samples
    for one, place in zip(stored, samples.places(len(loaded.data.eval)), strict=True):
        assert one["text"] == loaded.data.eval.texts[place]
        assert one["right"] == loaded.data.labels[loaded.data.eval.targets[place]]
        with torch.no_grad():
            logits = loaded.task.logits(loaded.task.batch("eval", [place]))[0]
        share = logits.softmax(0)[loaded.data.eval.targets[place]].item()
        assert one["after"]["share"] == pytest.approx(share, rel=1e-5)
        assert one["after"]["said"] == loaded.data.labels[int(logits.argmax())]
        assert one["before"]["share"] != one["after"]["share"]
    lines = [json.loads(line) for line in (options.output / "metrics.jsonl").read_text().splitlines()]
    held = [line for line in lines if line["kind"] == "eval"]
    assert [one["share"] for one in held[0]["samples"]] == [one["before"]["share"] for one in stored]
    assert [one["share"] for one in held[-1]["samples"]] == [one["after"]["share"] for one in stored]


def test_lines_for_a_person() -> None:
    said = [
        {"text": "a\nlong " + "text " * 20, "right": "kind", "before": {"share": 0.034}, "after": {"share": 0.9}},
        {"text": "short", "right": ["Paris", "paris"], "before": {"share": None}, "after": {"share": 1.0}},
    ]
    first, second = samples.lines(said)
    assert first.startswith('kind         3 % ->  90 %  "a long text text')
    assert first.endswith('..."')
    assert second == 'Paris          ? -> 100 %  "short"'


def test_nothing_is_said_where_texts_were_left_out(options: Options, models_dir: Path) -> None:
    loaded = runs.load(options, functools.partial(runs.line, Console(quiet=True)))
    assert len(samples.look(loaded.task)) == samples.COUNT
    assert all(math.isfinite(one["share"]) for one in samples.look(loaded.task))
    loaded.task.empty["eval"] = 1
    assert samples.look(loaded.task) == []
