"""Options without effect are told: each of them, for the objectives that have no use for it, and only there."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers")

from tests.finetune import test_columns
from zokern.cli import app
from zokern.finetune import Options, finetune, unused

models_dir, options = test_columns.models_dir, test_columns.options
CHANGES: dict[str, Any] = {
    "image_column": "picture", "label_column": "topic", "label_order": "b,a", "unlabelled": "none", "max_answer": 8,
    "temperature": 0.1, "text_column": "sentence", "max_length": 32, "template": "{text}: ", "space": False,
}  # fmt: skip
WITHOUT = {
    "similarity": {"image_column", "max_answer", "template", "space"},
    "classifier": {"image_column", "max_answer", "temperature", "template", "space"},
    "prompt": {"image_column", "max_answer", "temperature"},
    "choices": {"image_column", "label_order", "max_answer", "temperature"},
    "answer": {"image_column", "label_column", "label_order", "unlabelled", "temperature"},
    "image": {"max_answer", "temperature", "text_column", "max_length", "template", "space"},
}


@pytest.mark.parametrize("objective", WITHOUT)
def test_each_option_without_effect_is_told(objective: str) -> None:
    found = {
        name
        for name, value in CHANGES.items()
        if unused.notes(asked := Options(**{name: value}), dataclasses.replace(asked, objective=objective))
    }
    assert found == WITHOUT[objective]
    assert unused.notes(Options(), Options(objective=objective, template="{premise}")) == []  # a template of --task


def test_the_column_of_a_template_that_has_no_text() -> None:
    asked = Options(text_column="sentence", template="{premise}?", objective="prompt")
    assert unused.notes(asked, asked) == ["--text-column has no effect: --template does not name {text}"]


def test_a_run_tells(options: Options, capsys: pytest.CaptureFixture) -> None:
    options.max_answer, options.temperature = 8, 0.1
    finetune(options)
    said = " ".join(capsys.readouterr().out.split())
    assert "--max-answer has no effect: it is for --objective answer, and the objective is prompt" in said
    assert "--temperature has no effect: it is for --objective similarity, and the objective is prompt" in said


def test_a_flag_is_told_as_it_is_given(options: Options) -> None:
    given = ["--model", options.model, "--data", options.data, "--output", str(options.output), "--steps", "2"]
    fixed = ["--objective", "classifier", "--pair-column", "hypothesis", "--text-column", "premise", "--device", "cpu"]
    result = CliRunner().invoke(app, ["finetune", *given, *fixed, "--threads", "1", "--no-space"])
    assert result.exit_code == 0, result.output
    assert "--no-space has no effect: it is for --objective prompt or choices" in " ".join(result.output.split())
