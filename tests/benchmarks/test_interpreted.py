"""Counts of machine code beside those of an interpreter's run, with numbers by hand, and of the kernels themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine_code import listing
from tests.ptx import build, interpreted
from zokern.contract.rules import RULES

ELEMENTS = 1000
# An element: 14 float32 results, of which 4 in two packed instructions, 2.5 wide products, 2 conversions, and the rest.
ROW: dict[str, Any] = {
    "name": "toy",
    "pipes": {"fp32": 10.0, "fp32x2": 2.0, "imad.wide": 2.5, "convert": 0.5, "xu": 1.5, "int": 6.0, "memory": 0.5},
    "pipes_extra": {"fp32": 14.0, "imad.wide": 2.0, "convert": 1.5},
}
RUN = {
    "fma.rn.f32": 7000, "mul.rn.f32": 2500, "add.rn.f32": 500, "fma.rn.f32x2": 1500, "mul.rn.f32x2": 500,
    "mul.wide.u32": 2400, "mad.wide.u32": 50, "mul.wide.s32": 50,
    "cvt.rn.f32.s32": 1000, "cvt.rn.f32.u32": 500, "cvt.rn.bf16x2.f32": 500,
    "cvt.u32.u64": 6000, "xor.b32": 4000, "mov.b32": 3000, "setp.gt.f32": 100, "neg.f32": 50, "ld.global.v4.f32": 250,
    "mul.lo.s32": 500, "fma.rn.f64": 100, "selp.f32": 100,
}  # fmt: skip


def test_what_computes_is_found_in_both() -> None:
    found = interpreted.compare(ROW, RUN, ELEMENTS)
    assert found.counted == {"float32 results": 14.0, "wide products": 2.5, "conversions": 2.0}
    assert found.executed == found.counted
    assert found.slots == 10 + 2 + 2.5 + 0.5 + 1.5 + 6 + 0.5
    assert found.instructions == sum(RUN.values()) / 1000 == 30.6
    assert found.differences() == []


def test_seeds_and_stages_are_those_of_the_run() -> None:
    more = {
        name: times + 2 * (14_000 * (name == "fma.rn.f32") + 2000 * (name == "mul.wide.u32"))
        for name, times in RUN.items()
    }
    more["cvt.rn.f32.s32"] += 2 * 1500
    assert interpreted.compare(ROW, more, ELEMENTS, seeds=3).differences() == []
    assert len(interpreted.compare(ROW, more, ELEMENTS, seeds=2).differences()) == 3
    chain = ROW | {"pipes_once": {"memory": 1.0}, "pipes_stochastic": ROW["pipes"] | {"imad.wide": 5.0}}
    twice = {name: 2 * times for name, times in RUN.items()} | {"mul.wide.u32": 2 * 2400 + 2500}
    assert interpreted.compare(chain, twice, ELEMENTS, stages=2, stochastic=1).differences() == []


@pytest.mark.parametrize(
    ("instruction", "times", "said"),
    [
        ("fma.rn.f32", 14_000, "float32 results: 14.00 counted for an element, 21.00 executed"),
        ("fma.rn.f32x2", 0, "float32 results: 14.00 counted for an element, 11.00 executed"),
        ("mul.rn.f32", 3500, "float32 results: 14.00 counted for an element, 15.00 executed"),  # a decay
        ("mul.wide.u32", 4800, "wide products: 2.50 counted for an element, 4.90 executed"),
        ("cvt.rn.f32.s32", 0, "conversions: 2.00 counted for an element, 1.00 executed"),
    ],
)
def test_a_difference_is_told(instruction: str, times: int, said: str) -> None:
    assert interpreted.compare(ROW, RUN | {instruction: times}, ELEMENTS).differences() == [said]


def test_what_is_amortised_over_a_chunk_is_no_difference() -> None:
    """Addresses of a block and the like: a tenth of an instruction for an element, or 4 % of those that there are."""

    def found(instruction: str, more: int) -> list[str]:
        return interpreted.compare(ROW, RUN | {instruction: RUN[instruction] + more}, ELEMENTS).differences()

    assert found("cvt.rn.f32.s32", 95) == []
    assert found("cvt.rn.f32.s32", 105) != []
    assert found("add.rn.f32", 550) == []
    assert found("add.rn.f32", 570) != []


# The counter goes round this kernel's loop the shorter way: the square of a sum has a product less for each seed.
SHORTER = [("adamezo", 3)]


@pytest.mark.built
def test_the_kernels_do_what_was_counted() -> None:
    """Each rule's pass over whole chunks of bfloat16: float32 results, wide products and conversions of an element."""
    if (reason := build.unavailable_reason()) is not None:
        pytest.skip(reason)
    root = Path(__file__).resolve().parents[2]
    stored = json.loads((root / "benchmarks" / "results" / "machine_code.json").read_text())["kernels"]
    wrong = []
    for arch in build.carried():
        command = [sys.executable, "-m", "tests.ptx.counts", "cuda", str(arch)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        for run in map(json.loads, done.stdout.splitlines()):
            wanted = {"backend": "cuda", "kernel": "pass", "arch": arch, "rule": run["rule"], "dtype": "bfloat16",
                      "state": "float32", "seeds": "one" if run["seeds"] == 1 else "any"}  # fmt: skip
            row = next(
                row for row in stored
                if row["distribution"] not in ("rademacher", "low_rank") and row["rounding"] != "stochastic"
                and all(row[key] == value for key, value in wanted.items())
            )  # fmt: skip
            found = interpreted.compare(row, run["executed"], run["elements"], seeds=run["seeds"])
            # Addresses of a tile's arrays are wide products in the one and sums in the other: up to 3.5 for 8 elements.
            addresses = found.counted["wide products"] - found.executed["wide products"]
            known = ["wide products"] if abs(addresses) <= 3.5 / 8 else []
            known += ["float32 results"] if (run["rule"], run["seeds"]) in SHORTER else []
            wrong += [
                f"{run['rule']} sm_{arch}, {run['seeds']} seeds: {told}"
                for told in found.differences()
                if told.partition(":")[0] not in known
            ]
    assert wrong == []


# What computes, and accesses. Not what surrounds it: a loop's entry and exit are not counted; waits and spilled scalars go
# where the registers want them, and a launch that rounds to nearest has an argument less than what is counted.
COMPUTES = {"valu", "packed", "product", "cvt", "trans", "vmem", "lds"}


@pytest.mark.built
def test_amds_kernels_do_what_was_counted() -> None:
    """The interpreter runs AMD's machine code itself: of the loops' vector instructions at most one in eight elements is
    another."""
    pytest.importorskip("triton")
    root = Path(__file__).resolve().parents[2]
    stored = json.loads((root / "benchmarks" / "results" / "machine_code.json").read_text())["kernels"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ptx.counts", "triton", "gfx942"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    ran = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ran) == 2 * len(RULES)
    for run in ran:
        name = f"triton {run['rule']}<bf16, normal, nearest>"
        row = next(row for row in stored if (row["arch"], row["name"]) == ("gfx942", name))
        counted, executed = Counter(row["pipes"]), Counter[str]()
        for pipe, count in row["pipes_extra"].items():
            counted[pipe] += (run["seeds"] - 1) * count
        for opcode, times in run["executed"].items():
            executed[listing.Instruction(False, opcode, "").pipe] += times / run["elements"]
        assert sum(counted[pipe] for pipe in COMPUTES) > 20
        for pipe in COMPUTES:
            assert abs(executed[pipe] - counted[pipe]) <= 1 / 8, (name, run["seeds"], pipe)
