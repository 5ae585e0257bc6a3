"""Passes in a step beside their kernels alone, and what a lower clock makes of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.steps import page, passes
from zokern.bench import model, prediction


def test_a_lower_clock_lengthens_arithmetic_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert passes.slower("mezo", "H100", model.DEVICES["H100"].clock) == pytest.approx(1)
    assert 1 < passes.slower("hizoo", "H100", 1.7e9) < passes.slower("mezo", "H100", 1.7e9) < 1.98 / 1.7
    assert passes.slower("mezo", "H100", 1.7e9) < passes.slower("mezo", "H200", 1.7e9)  # less time for a byte
    stored = json.loads(prediction.MACHINE_CODE.read_text())["kernels"]
    slow = dataclasses.replace(model.DEVICES["H100"], clock=1.7e9)  # the model's own time of a GPU with this clock
    times = [0.0, 0.0]
    for case in passes.PASSES["mezo"]:
        row = prediction.row_of(case, "cuda", stored, 90)
        assert row is not None
        times[0] += model.seconds(row, 4, "H100")
        with monkeypatch.context() as patch:
            patch.setitem(model.DEVICES, "H100", slow)
            times[1] += model.seconds(row, 4, "H100")
    assert passes.slower("mezo", "H100", 1.7e9) == pytest.approx(times[1] / times[0])


def test_passes_alone_are_those_of_the_step(tmp_path: Path) -> None:
    """Two perturbations rounded to nearest, an update rounded stochastically; other cases are left alone."""

    def case(rounding: str, ns: float, **more: Any) -> dict[str, Any]:
        about = {"rule": "axpy", "dtype": "bfloat16", "state_dtype": "float32", "distribution": "normal", "seeds": 1,
                 "rounding": rounding, "stages": 1, "left_out": 0.0} | more  # fmt: skip
        return {"case": about, "ways": {"zokern cuda": {"ns_per_element": ns}}}

    cases = [
        case("nearest", 7.0, seeds=2),
        case("nearest", 9.0, left_out=0.5),
        case("nearest", 1.0),
        case("stochastic", 3.0),
    ]
    (tmp_path / "kernels-axpy-cuda.json").write_text(json.dumps({"results": {str(i): c for i, c in enumerate(cases)}}))
    assert passes.alone(tmp_path, "mezo", 10**9) == pytest.approx(1 + 1 + 3)


def test_rounds_that_the_time_did_not_suffice_for_are_told() -> None:
    def result(rounds: int) -> dict[str, Any]:
        return {"status": "timed", "step": {"rounds": rounds}}

    assert page.rounds_told({"a": result(3), "b": {"status": "left out"}}, 3) == ""
    told = page.rounds_told({"a": result(3), "b": result(2), "c": result(2), "d": result(1)}, 3)
    assert told == " The time sufficed for no more rounds than 2 of 2 cases, 1 of d."
