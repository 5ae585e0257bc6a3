"""What the GPU suite runs besides the tests, on a machine without a GPU and at tiny sizes: that it sees what is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import cases as pass_cases
from benchmarks.gpu import equality
from benchmarks.gpu import sanitizer as sanitizer_program
from zokern import backends
from zokern.backends import cpu
from zokern.backends import triton as triton_backend
from zokern.contract import reference
from zokern.contract.rules import RULES
from zokern.passes.spec import PassNumbers, PassSpec

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """The programs ask for Triton's interpreter on a CPU, which must not reach other tests where there is a GPU."""
    before = os.environ.get("TRITON_INTERPRET")
    yield
    os.environ.pop("TRITON_INTERPRET", None)
    if before is not None:
        os.environ["TRITON_INTERPRET"] = before


@pytest.fixture
def broken_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the CPU backend take other seeds whenever a rule runs."""
    right = cpu.run

    def breaking(rule: str) -> None:
        def run(table: Any, kind: PassSpec, scalars: PassNumbers) -> None:
            right(table, kind, scalars if kind.rule.name != rule else PassNumbers(
                scalars.seeds ^ 1, scalars.coefs, scalars.shared, scalars.rounding_seed, scalars.enabled))  # fmt: skip

        monkeypatch.setattr(cpu, "run", run)

    return breaking


def test_cases_cover_every_rule_dtype_rounding_and_number_of_seeds() -> None:
    cases = list(pass_cases.all_cases())
    assert len(set(cases)) == len(cases)
    for rule in RULES:
        mine = [c for c in cases if c.rule == rule]
        kinds = {(c.dtype, c.rounding, c.distribution, c.seeds) for c in mine}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rounding in ("nearest",) if dtype == torch.float32 else ("nearest", "stochastic"):
                for distribution in ("normal", "rademacher"):
                    assert {(dtype, rounding, distribution, k) for k in (1, 3)} <= kinds
        assert any(c.seeds_on_device for c in mine)
        assert any(c.out_of_place for c in mine)
    assert {c.seeds for c in cases if c.rule == "axpy"} >= {0, 1, 3, 33, 130}


def test_inputs_are_off_boundaries_and_have_special_values() -> None:
    start = pass_cases.inputs(pass_cases.Case("hizoo", torch.bfloat16), 3000, pass_cases.CPU)
    items = [(w.data_ptr() - offset % 8 * 2) % 16 for w, offset in zip(start.weights, start.offsets, strict=True)]
    assert items[0] == items[1] == 0
    assert items[2] != 0
    assert start.weights[0].isnan().any()
    assert start.weights[0].isinf().any()
    assert all((h > 0).all() for h in start.states[0])
    again = pass_cases.copy(start, pass_cases.CPU)
    assert [w.storage_offset() for w in again.weights] == [w.storage_offset() for w in start.weights]


def test_equality_finds_a_wrong_seed_of_one_rule(
    broken_cpu: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--device", "cpu", "--elements", "300", "--backends", "cpu", "--seeds", "1", "--rules", "sign", "adam"]
    out = tmp_path / "equality.json"
    assert equality.main([*command, "--output", str(out)]) == 0
    run = json.loads(out.read_text())
    assert run["settings"]["compared"] == run["settings"]["cases"] == len(run["results"]) > 20
    assert all(row["different"] == 0 and row["elements"] > 200 for row in run["results"])
    broken_cpu("adam")
    assert equality.main([*command, "--output", str(out)]) == 1
    wrong = {row["rule"] for row in json.loads(out.read_text())["results"] if row["different"]}
    assert wrong == {"adam"}
    assert "WRONG" in capsys.readouterr().out


def test_equality_says_what_a_time_limit_left_out_and_keeps_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "equality.json"
    command = ["--device", "cpu", "--elements", "100", "--backends", "cpu", "--rules", "axpy", "--output", str(out)]
    assert equality.main([*command, "--time-limit", "1e-9"]) == 1  # nothing was compared
    assert json.loads(out.read_text())["settings"]["stopped"] == "time limit"

    def refuse(*_: object) -> None:
        raise RuntimeError("launching a pass: no kernel image is available")

    monkeypatch.setattr(cpu, "run", refuse)
    assert equality.main([*command, "--cases", "2"]) == 1
    assert [row["error"] for row in json.loads(out.read_text())["results"]] == [
        "RuntimeError: launching a pass: no kernel image is available"
    ] * 2


def test_equality_compares_in_several_processes(tmp_path: Path) -> None:
    out = tmp_path / "equality.json"
    command = ["--device", "cpu", "--elements", "100", "--backends", "cpu", "--cases", "4", "--jobs", "2"]
    assert equality.main([*command, "--output", str(out)]) == 0
    assert len(json.loads(out.read_text())["results"]) == 4


def test_equality_keeps_what_it_has_when_a_process_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on the day: the second of three cases takes its process with it, and the pool takes the third."""

    class Pool(contextlib.nullcontext):
        def __init__(self, *given: Any) -> None:
            super().__init__(self)
            self.done = 0

        def submit(self, task: Any, *given: Any) -> Future[Any]:
            future: Future[Any] = Future()
            self.done += 1
            if self.done == 1:
                future.set_result(task(*given))
            else:
                future.set_exception(BrokenProcessPool("A process in the process pool was terminated abruptly"))
            return future

        def shutdown(self, **how: bool) -> None:
            pass

    monkeypatch.setattr(equality, "ProcessPoolExecutor", Pool)
    out = tmp_path / "equality.json"
    command = ["--device", "cpu", "--elements", "300", "--backends", "cpu", "--cases", "3", "--jobs", "2"]
    assert equality.main([*command, "--output", str(out)]) == 1
    stored = json.loads(out.read_text())
    assert len(stored["results"]) == stored["settings"]["compared"] == 1
    assert stored["settings"]["stopped"].startswith("a process was killed")
    assert "1 of 3 cases, then: a process was killed (out of memory?); try fewer --jobs" in capsys.readouterr().out


def test_equality_refuses_what_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        equality.main(["--device", "cpu", "--backends", "cuda"])
    assert "backend cuda cannot run on cpu" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        equality.main(["--device", "cpu", "--rules", "adamw"])
    assert "--rules has adamw; the rules are axpy, " in capsys.readouterr().err


def test_sanitizer_program_finds_wrong_bits(
    broken_cpu: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--device", "cpu", "--backends", "cpu", "--elements", "400", "--cases", "40"]
    assert sanitizer_program.main(command) == 0
    assert "40 of cpu passes, 0 with wrong bits" in capsys.readouterr().out
    assert sanitizer_program.main([*command, "--time-limit", "1e-9"]) == 0
    said = capsys.readouterr().out
    assert "time limit: 10 of 40 cases" in said
    assert "10 of cpu passes, 0 with wrong bits" in said
    broken_cpu("momentum")
    assert sanitizer_program.main(command) == 1
    assert "'rule': 'momentum'" in capsys.readouterr().out


def test_the_time_limit_of_the_sanitizer_program_counts_from_its_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Importing and starting CUDA is what takes long under a tool; a first few cases are watched all the same."""
    now = [0.0]

    def slow_start(name: str, device: torch.device) -> None:
        now[0] = 20.0

    monkeypatch.setattr(backends, "unavailable_reason", slow_start)
    monkeypatch.setattr(sanitizer_program.time, "monotonic", lambda: now[0])
    command = ["--device", "cpu", "--backends", "cpu", "--elements", "400", "--cases", "20", "--time-limit"]
    assert sanitizer_program.main([*command, "21"]) == 0
    assert "20 of cpu passes" in capsys.readouterr().out
    now[0] = 0.0
    assert sanitizer_program.main([*command, "19"]) == 0
    assert "10 of cpu passes" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/backends/test_gpu.py sums over all words")
def test_triton_checksum_of_a_part() -> None:
    """Across the sign change of the angle, over whole programs, a cut tile and the last words of all."""
    if triton_backend.unavailable_reason() is not None:
        pytest.skip(f"Triton backend: {triton_backend.unavailable_reason()}")
    from zokern.backends import native
    from zokern.backends.triton.checksum import normal_checksum

    for first, count in ((0x7FFF8000, 70_001), (2**32 - 1000, 1000), (5, 1)):
        wanted = native.extension.cpu_normal_checksum(first, first + count, 1, "plain")
        assert normal_checksum(first, first + count, torch.device("cpu")) == wanted
    z0, z1 = reference.normal_pair(5)
    assert wanted == (int(z0.view("uint32")[0]) * 11 + int(z1.view("uint32")[0]) * 12) % 2**64


def test_checksum_program(tmp_path: Path) -> None:
    out = tmp_path / "checksum.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.checksum",
        "--device",
        "cpu",
        "--words",
        "3000",
        "--output",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    if triton_backend.unavailable_reason() is None and not torch.cuda.is_available():
        assert done.returncode == 0, done.stderr
        assert json.loads(out.read_text())["results"]["triton"]["right"]
    else:
        assert "not run" in done.stdout
