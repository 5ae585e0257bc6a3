"""The table of GPU targets: what it computes from, and that its measured column is what is stored, or says that none is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import parts
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
    cells = dict(zip((target.title for target in targets.TARGETS), targets.predictions("H200"), strict=True))
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
    assert targets.figures(tmp_path) == ["not yet run"] * len(targets.TARGETS)
    assert targets.predictions("a GPU") == ["not predicted"] * len(targets.TARGETS)


def store(path: Path, results: dict[str, Any], gpu: str = "a GPU") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": {"gpu": gpu}, "results": results}))


def store_some(folder: Path, gpu: str = "a GPU", share: float = 0.91) -> None:
    rest = {"status": "timed", "peer": False, "extra_share": 0.05}
    ours = {"share_of_copy": share, "median": 2.0, "speedup_over": {"published": 8.25}}
    both = {"zokern cuda": ours, "zokern triton": {"median": 2.1}}
    beside = {"zokern cuda": {"speedup_over": {"compiled": 1.75}}}
    store(folder / "kernels-axpy-cuda.json", {targets.AXPY.title: {"ways": both}}, gpu)
    store(folder / "compiled" / "kernels-axpy-cuda.json", {targets.AXPY.title: {"ways": beside}}, gpu)
    smaller = {"opt-1.3b 16x256 mezo inplace": {**rest, "step": {"median": 1.0}, "passes": 0.5}}
    store(folder / "step-cuda-opt-1.3b.json", smaller, gpu)
    short = {"opt-13b 16x40 mezo published": {"status": "timed", "peer": True, "step": {"median": 5.5}, "passes": 4.0},
             "opt-13b 16x40 mezo inplace": {**rest, "step": {"median": 2.0}, "passes": 0.9}}  # fmt: skip
    store(folder / "step-cuda-opt-13b-16x40.json", short, gpu)
    store(folder / "step-cuda-opt-13b.json", {
        "opt-13b 16x256 mezo published": {"status": "timed", "peer": True, "step": {"median": 6.0}, "passes": 2.0},
        "opt-13b 16x256 mezo stream": {**rest, "step": {"median": 4.0}, "passes": 0.4},
        "opt-13b 16x256 mezo inplace": {**rest, "step": {"median": 5.0}, "passes": 0.9, "extra_share": 0.0},
        "opt-13b 16x256 mezo graphed": {**rest, "step": {"median": 3.0}},
        "opt-13b 16x256 hizoo published": {"status": "timed", "peer": True, "step": {"median": 9.0}, "passes": 2.0},
        "opt-13b 16x256 hizoo stream": {"status": "does not fit", "peer": False},
        "opt-13b 16x256 hizoo stream, h bfloat16": {
            **rest, "step": {"median": 4.0}, "passes": 0.4, "curvature_dtype": "bfloat16"
        },
    }, gpu)  # fmt: skip


def test_measured_figures_are_those_of_the_files(tmp_path: Path) -> None:
    store_some(tmp_path)
    found = targets.figures(tmp_path)
    assert [target.told(figure) for target, figure in zip(targets.TARGETS, found, strict=True)] == [
        "91.0%", "not in the run", "not yet run", "not yet run", "**+5.0%**", "8.2 x", "1.8 x", "**10.0%**", "1.50 x",
        "2.25 x with h in bfloat16", "2.75 x", "5.0%",
    ]  # fmt: skip


def test_each_gpu_has_its_own_columns_and_what_misses_is_bold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each from its own folder; a figure that is rounded to what is wanted and misses it is told finely enough."""
    monkeypatch.setattr(parts, "RESULTS", tmp_path)
    store_some(tmp_path, "NVIDIA H100 80GB HBM3", 0.8996)
    store_some(tmp_path / "h200", "NVIDIA H200", 0.9004)
    assert parts.gpus() == {"H100": tmp_path, "H200": tmp_path / "h200"}
    head, _, first, *_, last = targets.table_of_targets().splitlines()
    assert head == "| target | wanted | predicted, H100 | measured, H100 | predicted, H200 | measured, H200 |"
    assert [cell.strip() for cell in first.split("|")][4:7:2] == ["**90.0%**", "90.0%"]
    assert last.startswith("Met are 6 of 12 on the H100, 7 of 12 on the H200;")


def test_a_target_is_met_at_its_edge() -> None:
    for target in targets.TARGETS:
        beyond = 1e-6 if target.at_most else -1e-6
        assert target.met(targets.Figure(target.wanted))
        assert not target.met(targets.Figure(target.wanted + beyond))


LATER = ("llm-cuda.json", "step-cuda-opt-13b-16x40.json")  # runs of their own; their pages have each one's commit


def test_the_stored_runs_are_of_the_cards_that_the_page_names() -> None:
    """Each folder's runs are of one card, and of the commit of its suite where they are the page's own."""
    commits = set()
    for gpu, folder in parts.gpus().items():
        for path in folder.glob("*-cuda*.json"):
            run = json.loads(path.read_text())
            if path.name != "counters-cuda.json":  # the H200's, and the page says so
                assert parts.short_gpu(run) == gpu, path
                commits |= {run["commit"]} if folder == parts.RESULTS and path.name not in LATER else set()
    assert len(commits) == 1
