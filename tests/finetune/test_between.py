"""A run that was best in between says so, and its command makes those weights again."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from tests.finetune.test_finetune import command, models_dir, options, table, tensors  # noqa: F401
from zokern.finetune import Options, between, finetune, loop
from zokern.finetune.loop import Result

# ruff: noqa: F811 - fixtures of another file


def figures(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """What the evaluations of the next run say."""
    left = [(score, 1.0) for score in scores]
    monkeypatch.setattr(loop, "evaluate", lambda *_: left.pop(0))


def test_the_command_of_the_summary_makes_the_better_weights_again(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options.lr_schedule, options.output = "constant", tmp_path / "a run"
    figures(monkeypatch, 0.5, 1.0, 0.5)
    finetune(options)
    said = capsys.readouterr().out
    assert "accuracy 100.0 % after step 4, at the end 50.0 %: a lower --lr or a shorter run keeps it" in said
    assert "docs/choose.md)" not in said.partition("\naccuracy")[2]  # no other advice beside it
    again = shlex.split(re.findall(r"the weights of step 4 again: zokern (.*)", said)[0])
    monkeypatch.chdir(tmp_path)
    code, said = command(*again)
    assert (code, "4 steps replayed" in said) == (0, True), said
    figures(monkeypatch, 0.5, 1.0)
    short = finetune(dataclasses.replace(options, steps=4, output=tmp_path / "short"))
    made, wanted = tensors(tmp_path / "step-4"), tensors(short.output.checkpoint)
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    assert "after step" not in capsys.readouterr().out


def test_without_a_journal_no_command_is_named(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options.journal = False
    figures(monkeypatch, 0.5, 1.0, 0.5)
    finetune(options)
    said = capsys.readouterr().out
    assert "the weights of step 4 again: without a journal they are gone" in said
    assert "replay" not in said


def record(step: int, metric: str, score: float, loss: float | None) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "metric": metric, "score": score, "loss": loss}


@pytest.mark.parametrize(
    ("metric", "held", "last", "rows", "step"),
    [
        ("accuracy", [(0.723, 1.0), (0.70, 1.0)], (0.616, 1.0), 159, 1),
        ("accuracy", [(0.723, 1.0)], (0.616, 1.0), 40, None),  # chance
        ("accuracy", [(1.0, 1.0)], (1.0, 1.0), 40, None),
        ("token_f1", [(0.6, 1.0), (0.9, 1.0)], (0.5, 1.0), 100, 2),
        ("matthews", [(0.1, 0.5), (0.1, 0.4)], (0.1, 0.8), 100, 2),  # by the loss, which was 1 before
        ("matthews", [(0.9, 0.4)], (0.1, 0.6), 100, None),
        ("matthews", [(0.9, 0.4), (0.9, None)], (0.1, float("nan")), 100, 1),
        ("matthews", [(0.9, 0.999)], (0.1, 1.1), 100, None),  # nothing was learnt
        ("matthews", [], (0.1, 1.1), 100, None),
    ],
)
def test_when_it_is_clearly_better(
    metric: str, held: list[tuple[float, float | None]], last: tuple[float, float], rows: int, step: int | None
) -> None:
    records = [record(i, metric, *one) for i, one in enumerate([(0.9, 1.0), *held, last])]
    result = Result(len(records) - 1, False, (0.5, last[0]), (1.0, last[1]), {})
    top = between.better(records, result, metric, rows)
    assert (top and top["step"]) == step
    if top is not None and metric == "matthews":
        assert between.said(top, result, metric, None)[0].startswith("held-out loss 0.4000, matthews ")
