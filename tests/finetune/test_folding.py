"""`zokern finetune --fold-every`: evaluated, saved and replayed with the updates that wait, and taken up in mid-window."""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from tests.finetune.test_finetune import command, models_dir, options, records, table, tensors  # noqa: F401
from tests.finetune.test_resuming import alike, broken, no_pictures, resume  # noqa: F401
from zokern import journal
from zokern.finetune import Options, finetune


def waits(options: Options) -> Options:
    return dataclasses.replace(options, placement="forward", distribution="lowrank:1", fold_every=5)


def test_saved_replayed_and_taken_up(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = waits(options)  # 8 steps: 3 wait in the end
    summary = finetune(whole)
    saved = tensors(summary.output.checkpoint)
    code, said = command("replay", whole.model, summary.output.journal, "-o", tmp_path / "again")
    assert code == 0, said
    again = tensors(tmp_path / "again")
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert journal.Reader(summary.output.journal).header["features"] == ["lowrank", "fold"]
    half = dataclasses.replace(whole, output=tmp_path / "half")
    broken(half, 3, monkeypatch)
    resume(half)
    alike(half.output, whole.output)


def test_evaluated_with_what_waits(options: Options, tmp_path: Path) -> None:
    """Held-out losses along the way are, to rounding, those of a run that folds after each step."""
    found = []
    for fold_every in (1, 6):
        one = dataclasses.replace(waits(options), fold_every=fold_every, output=tmp_path / str(fold_every))
        finetune(one)
        found.append([line["loss"] for line in records(one.output) if line["kind"] == "eval"])
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert len({round(loss, 3) for loss in found[1]}) == 3
