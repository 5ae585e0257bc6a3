"""The CPU backend on Arm, without an Arm machine: cross-compiled, and its tests run by QEMU.

    make arm                                                    # all, some twenty minutes on two cores
    python -m tests.arm --tests tests/contract tests/backends   # fewer tests
    python -m tests.arm --processor neoverse-v1                 # another processor, by QEMU's name

Files of an Arm machine, its Python among them, come from Debian's packages and lie in --folder, where later calls find
them. A wheel is made from the sdist by this machine's compiler for Arm, and is installed there with torch and the tests'
libraries. There run the report and the tests, on a copy of these, so that nothing of the checkout is imported. Each
processor's counts are stored as they are there, and `python -m benchmarks.pages docs/install.md` tells of them.

It shows bits and faults. It shows no speed: emulated, everything takes some fifteen times as long. The instructions that
a pass executes are counted by benchmarks.arm.run.

Needs mmdebstrap and Debian's g++-aarch64-linux-gnu, a network, and 3 GB of disk.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import zokern
from tests.arm.machine import PLAINEST, TORCH, Machine, missing
from tests.outside import ROOT, Cell, Failed, begun, copied, run, say, source_distribution, tested, told, versions
from zokern.bench.record import RESULTS, commit, store

SHOWN = ("torch", "numpy")
TESTS = ("tests/contract", "tests/backends", "tests/passes", "tests/net", "tests/journal")
WITHOUT = ("-k", "not triton")  # an interpreter in an emulator


def tried(machine: Machine, processor: str, tests: Sequence[str], work: Path, log: Path) -> Cell:
    """What the tests say on a processor.

    Raises:
        Failed: where the report fails, or pytest has no tests.
    """
    env = machine.variables(processor)
    found = versions(machine.python, SHOWN, log, env)
    report = run([machine.python, "-m", "zokern"], log, cwd=work, env=env)
    if "CPU neon" not in report:
        raise Failed(f"the report does not name the instructions of Arm:\n{report}")
    counts = tested(machine.python, [*WITHOUT, *tests], copied(work / "outside"), log, env)
    return {"versions": found, **counts, "emulator": machine.version()}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processor", nargs="+", default=[PLAINEST], help="QEMU's names of processors "
                        "(default: %(default)s; neoverse-v1 has SVE and bfloat16, which torch then uses)")  # fmt: skip
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="files or folders (default: %(default)s)")
    parser.add_argument("--torch", default=TORCH, metavar="REQUIREMENT", help="of a new folder (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "arm", help="of the machine's files, kept "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=RESULTS / "arm.json", help="results (default: %(default)s)")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    if (lacking := missing()) is not None:
        raise SystemExit(lacking)
    log = begun("arm")
    machine, cells = Machine(options.folder, log, options.torch), dict[str, Cell]()
    of = {"zokern": zokern.__version__, "commit": commit()}  # the sources may move on meanwhile
    settings = {"tests": options.tests, "processors": options.processor}
    with tempfile.TemporaryDirectory(prefix="zokern-arm-") as name:
        try:
            machine.make()
            say("a wheel for Arm")
            machine.install(machine.wheel(source_distribution(Path(name), log), Path(name)))
        except Failed as error:
            raise SystemExit(str(error)) from None
        for processor in options.processor:
            say(f"the tests on {processor}")
            with tempfile.TemporaryDirectory(dir=name) as work:
                try:
                    cell = tried(machine, processor, options.tests, Path(work), log)
                except Failed as error:
                    cell = {"broke": str(error)}
            cells[processor] = {**cell, **of}
            complete = len(cells) == len(options.processor)
            store("arm", torch.device("cpu"), settings, cells, options.output, complete=complete)
            say(told(cell))
    return int(any(cell.get("broke") or cell.get("failed") for cell in cells.values()))


if __name__ == "__main__":
    sys.exit(main())
