"""Counts the instructions that the CPU passes execute on Arm, under an emulator: no Arm machine is needed.

    make arm ARM="--tests tests/contract"     # makes a machine in build/arm, with zokern
    python -m benchmarks.arm.run              # counts there

It takes a QEMU with plugins, of 7.2 to 8.2 (count.c's interface): Debian 12's package qemu-user. A count is the difference
of two sizes over their difference in elements, so what a call costs whatever its size is not in it; one thread, one seed.
Emulated instructions are no seconds: how many a processor does at once is not known here. The same build gives the same
numbers each time.
Stores benchmarks/results/arm-instructions.json.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import study
from benchmarks.parts import ROOT
from zokern.bench.cases import SIZES
from zokern.bench.record import RESULTS, store

PLUGIN = Path(__file__).with_name("count.c")
EMULATOR = "ZOKERN_QEMU"  # an environment variable: what runs the machine's Python in place of its own QEMU
MARKER = 31339  # count.c's system call
SIDE = 256  # matrices of SIDE and 2 SIDE rows, and SIDE columns
RULES = ("axpy", "scaled_axpy", "hizoo")
DISTRIBUTIONS = ("normal", "rademacher", "lowrank:1")
ROUNDINGS = ("nearest", "stochastic")


def passes() -> list[tuple[str, str, str, str]]:
    """Rule, dtype, distribution and rounding of each."""
    every = itertools.product(RULES, SIZES, DISTRIBUTIONS, ROUNDINGS)
    return [case for case in every if SIZES[case[1]] == 2 or case[3] == "nearest"]


def told(command: list[str], **more: Any) -> str:
    return str(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **more).stdout)


def measure(python: Path, emulator: str, cpu: str, compiler: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """What the worker says of its build, and a row for each pass."""
    with tempfile.TemporaryDirectory() as folder:
        plugin = Path(folder, "count.so")
        told([compiler, "-O2", "-shared", "-fPIC", "-o", str(plugin), str(PLUGIN)])
        Path(folder, "benchmarks").symlink_to(ROOT / "benchmarks")  # without the checkout's zokern beside it
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {EMULATOR: emulator, "QEMU_PLUGIN": str(plugin), "QEMU_CPU": cpu}
        build, *counts = told([str(python), "-m", "benchmarks.arm.worker"], cwd=folder, env=environment).splitlines()
    if not counts:
        raise SystemExit("nothing was counted: the emulator took no plugin, or one of another interface")
    small, large = map(int, counts[1::4]), map(int, counts[3::4])
    rows = []
    for (rule, dtype, distribution, rounding), a, b in zip(passes(), small, large, strict=True):
        row = {"rule": rule, "dtype": dtype, "distribution": distribution, "rounding": rounding}
        rows.append({**row, "instructions_per_element": (b - a) / SIDE**2})
    return json.loads(build), rows


def main() -> None:
    parser = study.parser(
        __doc__, folder=(ROOT / "build" / "arm", "of the machine"), processor=("neoverse-n1", "that QEMU emulates"),
        emulator=("qemu-aarch64", "a QEMU with plugins"), compiler=("cc", "of the plugin, for this machine"),
    )  # fmt: skip
    args = parser.parse_args()
    emulator, python = shutil.which(args.emulator), args.folder.resolve() / "venv" / "bin" / "python"
    if emulator is None:
        parser.error(f"{args.emulator} is not on PATH: apt install qemu-user, or name it by --emulator")
    if not python.exists():
        parser.error(f"{args.folder} has no machine: make arm makes one")
    console, shown = Console(), Table("rule", "dtype", "distribution", "rounding", "instructions an element")
    with console.status("counting"):
        build, rows = measure(python, emulator, args.processor, args.compiler)
    for row in rows:
        *names, count = row.values()
        shown.add_row(*names, f"{count:.2f}")
    console.print(shown)
    settings = {"emulator": told([emulator, "--version"]).splitlines()[0], "cpu": args.processor, **build}
    path = args.output or RESULTS / "arm-instructions.json"
    print("stored in", store("arm-instructions", torch.device("cpu"), settings, rows, path).name)


if __name__ == "__main__":
    main()
