"""README's figure, and the figures that its text has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.front import page
from benchmarks.kernels.page import kernel_headlines
from benchmarks.parts import RESULTS, ROOT

README = (ROOT / "README.md").read_text()


def test_ratios_in_the_table_of_others_are_those_of_the_stored_runs() -> None:
    over, graphs = [], []
    for path in RESULTS.glob("step-cuda-*.json"):
        results = json.loads(path.read_text())["results"]
        for case in {name.removesuffix(" mezo published") for name in results if name.endswith(" mezo published")}:
            theirs = results[f"{case} mezo published"]["step"]["median"]
            over.append(theirs / results[f"{case} mezo stream"]["step"]["median"])
            graphs.append(theirs / results[f"{case} mezo graphed"]["step"]["median"])
    told = f"[{min(over):.1f} to {max(over):.1f} times as fast](docs/steps.md) on an H100"
    assert f"{told}, up to {max(graphs):.1f} in a CUDA graph" in README
    (row,) = [line for line in kernel_headlines().splitlines() if line.startswith("| axpy, K = 1 |")]
    assert f"[{row.split(' / ')[2].split(' x')[0]} times as fast](docs/benchmarks.md#in-short) on an H100" in README


def test_steps_are_beside_the_published_of_the_same_run() -> None:
    for one in page.STEPS:
        results = json.loads((RESULTS / one.file).read_text())["results"]
        theirs, ours = (results[f"{one.case} mezo {way}"]["step"]["median"] for way in ("published", one.ours))
        assert one.faster() == theirs / ours
        assert re.search(rf"\b{theirs / ours:.1f} (times|\(\[steps)", page.sentence())
        if one.graph:
            graph = results[f"{one.case} mezo graphed"]["step"]["median"]
            assert f"{theirs / graph:.1f} with our step as [one CUDA graph]" in page.sentence()
            assert one.passes("graphed") is None


def test_gpus_are_told_with_what_differed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gpu-suite-truth.json", "equality-cuda.json", "step-cuda-opt-1.3b.json"):
        (tmp_path / name).write_text((RESULTS / name).read_text())
    monkeypatch.setattr(page, "gpus", lambda: {"H100": tmp_path})
    assert "none differs from the CPU's; steps of OPT-1.3B |" in page.gpu_rows()
    equal = json.loads((tmp_path / "equality-cuda.json").read_text())
    equal["results"][3]["different"] = True
    (tmp_path / "equality-cuda.json").write_text(json.dumps(equal))
    assert re.search(r"\b1 differ from the CPU's", page.gpu_rows())
