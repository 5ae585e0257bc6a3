"""What the GPU suite left becomes results: which files, bits by rule, the clock by section; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import clocks, keep, page
from benchmarks.gpu.sections import PARTS

GPU = {"name": "NVIDIA H100 80GB HBM3", "driver": "1.2"}


def summary(part: str, **statuses: str) -> dict[str, Any]:
    sections = [{"name": n, "status": statuses.get(n, "passed"), "why": "", "seconds": 2.0} for n in PARTS[part]]
    date = "2026-11-28T03:49:05+00:00"
    return {"date": date, "commit": "abc", "gpu": GPU, "interrupted": False, "sections": sections}


def bits(**more: Any) -> dict[str, Any]:
    return {
        "rule": "axpy",
        "dtype": "float32",
        "backend": "cuda",
        "against": "cpu",
        "elements": 5,
        "different": 0,
    } | more


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An OUTDIR of --part truth."""
    folder = tmp_path / "out"
    (folder / "logs").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary("truth")))
    rows = [bits(), bits(backend="triton"), bits(), bits(dtype="bfloat16")]
    (folder / "equality.json").write_text(json.dumps({"benchmark": "equality", "results": rows}))
    (folder / "checksum.json").write_text("{}")
    return folder


def test_a_run_of_the_truth_is_kept(out: Path, tmp_path: Path) -> None:
    into = tmp_path / "results"
    assert keep.main([str(out), "--into", str(into)]) == 0
    assert {path.name for path in into.iterdir()} == {
        "gpu-suite-truth.json",
        "equality-cuda.json",
        "checksum-cuda.json",
    }
    assert json.loads((into / "gpu-suite-truth.json").read_text()) == summary("truth")
    assert json.loads((into / "equality-cuda.json").read_text())["results"] == [
        bits(dtype="bfloat16", cases=1), bits(cases=2, elements=10), bits(backend="triton", cases=1)
    ]  # fmt: skip


def test_a_run_of_the_speed_is_kept(tmp_path: Path) -> None:
    out, into = tmp_path / "out", tmp_path / "results"
    names = ("kernels-axpy-cuda.json", "compiled/kernels-axpy-cuda.json", "step-cuda-opt-13b.json")
    for name in (*names, "kernels-axpy-cuda.png", "logs/kernels.log"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    (out / "summary.json").write_text(json.dumps(summary("speed")))
    keep.keep(out, into)
    kept = {str(path.relative_to(into)): path.read_text() for path in into.rglob("*") if path.is_file()}
    assert json.loads(kept.pop("gpu-suite-speed.json"))["commit"] == "abc"
    assert kept == {name: name for name in names}


@pytest.mark.parametrize(("change", "message"), [
    ({"summary.json": summary("truth", tests="failed")}, "not kept: tests did not pass"),
    ({"summary.json": summary("truth") | {"interrupted": True}}, "not kept: the run did not pass"),
    ({"summary.json": summary("truth") | {"sections": summary("truth")["sections"][:1]}}, "run the suite with --part"),
    ({"equality.json": {"results": [bits(), bits(different=1)]}}, "equality.json has 1 cases that are wrong"),
    ({"equality.json": {"results": [bits(error="it does not compile")]}}, "equality.json has 1 cases that are wrong"),
])  # fmt: skip
def test_a_run_that_is_not_right_is_refused(change: dict[str, Any], message: str, out: Path, tmp_path: Path) -> None:
    for name, content in change.items():
        (out / name).write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=message):
        keep.main([str(out), "--into", str(tmp_path / "results")])
    assert not (tmp_path / "results").exists()


LOG = """$ /x/compute-sanitizer --tool memcheck --y python
========= COMPUTE-SANITIZER
351 of cuda, 24 of triton passes, 0 with wrong bits, 18 s
========= ERROR SUMMARY: 0 errors
$ /x/compute-sanitizer --tool racecheck --y python
time limit: 265 of 351 cases
265 of cuda, 24 of triton passes, 1 with wrong bits, 35 s
========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)
"""


def test_the_sanitizers_log_is_read(out: Path, tmp_path: Path) -> None:
    (out / "logs" / "sanitizer.log").write_text(LOG)
    keep.keep(out, tmp_path / "results")
    assert json.loads((tmp_path / "results" / "sanitizer-cuda.json").read_text())["results"] == {
        "memcheck": {"cuda": 351, "of": 351, "triton": 24, "wrong_bits": 0, "found": 0},
        "racecheck": {"cuda": 265, "of": 351, "triton": 24, "wrong_bits": 1, "found": 3},
    }
    with pytest.raises(SystemExit, match="no result of 'racecheck'"):
        keep.of_sanitizer(LOG.replace("RACECHECK SUMMARY", "killed"))


# ------------------------------------------------------------------------------------------------------------- the clock


def lines(*samples: tuple[float, int, float, int, int]) -> str:
    """Of (seconds since 03:49:05, MHz, watts, reasons, load)."""
    return "".join(
        f"2026/11/28 03:49:{5 + at:06.3f}, {clock}, 2619, {power}, 35, 0x{reasons:016x}, {load}\n"
        for at, clock, power, reasons, load in samples
    )


def test_the_clock_is_told_by_section() -> None:
    """Samples under load alone; those at a section's end are the next one's; only the power limit's bit counts."""
    taken = [
        (0.0, 345, 70.0, 1, 0), (2.0, 1980, 500.0, 0, 100), (2.2, 1980, 300.0, 0x20, 50), (3.9, 345, 70.0, 1, 49),
        (4.0, 1500, 700.0, 4, 100), (4.2, 1800, 600.0, 0x5, 90), (5.9, 1200, 650.0, 0, 99), (12.1, 345, 70.0, 1, 0),
    ]  # fmt: skip
    found = clocks.record(lines(*taken), summary("speed"))
    results = found["results"]
    assert results["build"] == {"samples": 1, "under_load": 0}
    assert results["kernels"] == {
        "samples": 3, "under_load": 2, "power_capped": 0.0, "clock": {"mean": 1.98e9, "min": 1.98e9, "max": 1.98e9},
        "memory_clock": {"min": 2.619e9, "max": 2.619e9}, "power": {"mean": 400.0, "max": 500.0},
    }  # fmt: skip
    step = results["step-1.3b"]
    assert (step["under_load"], step["power_capped"]) == (3, pytest.approx(2 / 3))
    assert step["clock"] == {"mean": 1.5e9, "min": 1.2e9, "max": 1.8e9}
    assert results["step-13b"]["samples"] == 0
    assert found["settings"]["samples"] == len(taken)


@pytest.mark.parametrize(("text", "message"), [
    ("", "there is no sample"),
    ("2026/11/28 03:49:05.0, 345\n", "line 1 has 2 columns, not the 7 of nvidia-smi --query-gpu="),
    (lines((0.0, 345, 70.0, 1, 0), (5.0, 345, 70.0, 1, 0)), "sample from before the suite until after it"),
    (lines((4.0, 345, 70.0, 1, 0), (13.0, 345, 70.0, 1, 0)), "sample from before the suite until after it"),
])  # fmt: skip
def test_samples_of_another_time_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        clocks.record(text, summary("speed"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "summary.json").write_text(json.dumps(summary("speed")))
    (out / "clocks.csv").write_text(text)
    with pytest.raises(SystemExit, match=message):
        keep.main([str(out), "--clocks", str(out / "clocks.csv"), "--into", str(tmp_path / "results")])
    assert not (tmp_path / "results").exists()


# ------------------------------------------------------------------------------------------------------------- the page


def test_counts_of_tests_are_read() -> None:
    assert page.counts("523 passed, 0 failed, 72 skipped") == (523, 0, 72)
    assert page.counts("7 passed, 1 failed, 2 skipped; test_x.py not run for the lack of y") == (7, 1, 2)


def test_what_ran_is_told_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong bits, hazards, failures and what there was no time for are not passed over."""
    versions = {"torch": "2", "triton": "3"}
    truth = summary("truth") | {"versions": versions, "nvcc": "13"}
    for section in truth["sections"]:
        if section["name"] in page.TESTS:
            section["why"] = "5 passed, 2 failed, 1 skipped"
    settings = {"compared": 159, "cases": 351, "elements": 50_000_000}
    equality = {"settings": settings, "results": [{"different": 3}]}
    whole = {"settings": settings | {"compared": 351, "elements": 1_000_000}, "results": [{"different": 0}]}
    stored = {
        "gpu-suite-truth.json": truth, "gpu-suite-speed.json": truth, "equality-cuda.json": whole,
        "equality-large-cuda.json": equality, "checksum-cuda.json": {"results": {"cuda": {"right": False}}},
        "sanitizer-cuda.json": {"results": keep.of_sanitizer(LOG)},
    }  # fmt: skip
    monkeypatch.setattr(page, "load", stored.__getitem__)
    told = page.ran_part()
    assert "351 cases of 1 million elements (`equality-cuda.json`), 159 of 351 cases of 50 million elements" in told
    assert "| no and 3 bits differ |" in told
    assert "| WRONG |" in told
    assert "| 4 errors; for lack of time racecheck 265 of 351 |" in told
    assert "| 5 and 5 pass, 4 fail; 1 and 1 are skipped |" in told
