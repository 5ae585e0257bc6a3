"""The table of GPU targets: what it computes from, and that its measured column is what is stored, or says that none is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels import targets
from zokern.bench.cases import Case

pytest.importorskip("transformers")


def test_moves_are_those_of_the_expressions() -> None:
    w, z = torch.ones(64), torch.ones(64)
    assert targets.moves(lambda: w + z) == 3
    assert targets.moves(lambda: (w * z).sqrt_()) == 3 + 2
    assert targets.moves(lambda: w * w) == 2  # read once
    assert targets.moves(lambda: torch.normal(0.0, 1.0, (64,))) == 1
    assert targets.published_bytes("mezo") == 2 * 4 * 8


def test_predictions_follow_from_the_shares_and_the_formula() -> None:
    told = targets.Prediction("H200")
    cells = dict(zip((name for name, *_ in targets.TARGETS), targets.predictions("H200"), strict=True))
    axpy = Case("", "axpy", "bfloat16")
    assert cells["axpy, bfloat16, share of the copy bandwidth"] == f"{told.share(axpy):.0%}"
    passes = 3 * told.parameters * 4 / (4.8e12 * 0.9 * told.share(axpy))
    step = passes + 2 * 2 * told.parameters * 4096 / (0.65 * 989e12)
    share, _, pipelined = cells["OPT-13B, 16x256 tokens: passes' share of a MeZO step"].partition("; pipelined ")
    assert share == f"{passes / step:.1%}"
    assert 0 < float(pipelined.rstrip("%")) < 100
    assert told.published("mezo", 2) == pytest.approx(told.parameters * 64 / 4.32e12 + 2 * told.forward)
    other = targets.Prediction("H100")
    assert other.share(axpy) > told.share(axpy)  # less bandwidth leaves more time for the same instructions
    assert other.seconds(axpy) > told.seconds(axpy)


def test_nothing_is_measured_before_it_is_stored(tmp_path: Path) -> None:
    assert targets.column(tmp_path) == ["not yet run"] * len(targets.TARGETS)


def test_measured_figures_are_those_of_the_files(tmp_path: Path) -> None:
    def store(name: str, results: dict[str, Any]) -> None:
        record, path = {"machine": {"gpu": "a GPU"}, "results": results}, tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record))

    rest = {"status": "timed", "peer": False, "extra_share": 0.05}
    ours = {"share_of_copy": 0.91, "median": 2.0, "speedup_over": {"published": 8.25}}
    store("kernels-axpy-cuda", {targets.AXPY.title: {"ways": {"zokern cuda": ours, "zokern triton": {"median": 2.1}}}})
    beside = {"zokern cuda": {"speedup_over": {"compiled": 1.75}}}
    store("compiled/kernels-axpy-cuda", {targets.AXPY.title: {"ways": beside}})
    store("step-cuda-opt-1.3b", {"opt-1.3b 16x256 mezo inplace": {**rest, "step": {"median": 1.0}, "passes": 0.5}})
    store("step-cuda-opt-13b", {
        "opt-13b 16x256 mezo published": {"status": "timed", "peer": True, "step": {"median": 6.0}, "passes": 2.0},
        "opt-13b 16x256 mezo stream": {**rest, "step": {"median": 4.0}, "passes": 0.4},
        "opt-13b 16x256 mezo inplace": {**rest, "step": {"median": 5.0}, "passes": 0.9, "extra_share": 0.0},
        "opt-13b 16x256 mezo graphed": {**rest, "step": {"median": 3.0}},
        "opt-13b 16x256 hizoo published": {"status": "timed", "peer": True, "step": {"median": 9.0}, "passes": 2.0},
        "opt-13b 16x256 hizoo stream": {"status": "does not fit", "peer": False},
        "opt-13b 16x256 hizoo stream, h bfloat16": {
            **rest, "step": {"median": 4.0}, "passes": 0.4, "curvature_dtype": "bfloat16"
        },
    })  # fmt: skip
    assert targets.column(tmp_path) == [
        "91% (a GPU)", "not in the run", "not yet run", "not yet run", "+5% (a GPU)", "8.2 x (a GPU)",
        "1.8 x (a GPU)", "10.0% (a GPU)", "1.50 x (a GPU)", "2.25 x with h in bfloat16 (a GPU)",
        "5.0% (a GPU)",
    ]  # fmt: skip
