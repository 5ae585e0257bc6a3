"""Runs each pass on tensors of two sizes under the emulator, whose plugin (count.c) prints the instructions of each run.

Counted are those of zokern's compiled module. The first line of the output says what was counted; then come the counts, of
each run one before it and its own.
"""

from __future__ import annotations

import ctypes
import json
import platform
import re
from pathlib import Path

import torch

from benchmarks.arm.run import MARKER, SIDE, passes
from zokern import directions
from zokern.backends import native
from zokern.bench.workload import COEFS, ROUNDING_SEEDS, SCALARS
from zokern.contract.rules import RULES
from zokern.passes.spec import PassNumbers, PassSpec
from zokern.sweep import Member, Passes, Sweep

_syscall = ctypes.CDLL(None).syscall
_syscall.argtypes = [ctypes.c_long] * 3


def count_module() -> dict[str, str]:
    """Has the instructions of zokern's compiled module counted from now on; says what built and runs it."""
    path = Path(native.extension.__file__).resolve()
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)) and "x" in line.split()[1]:
            _syscall(MARKER, *(int(end, 16) for end in line.split()[0].split("-")))
    compiler = re.search(rb"(GCC: \(|clang version )[^\0]*", path.read_bytes())  # the .comment section
    return {
        "module_compiler": compiler[0].decode() if compiler else "unknown",
        "guest_python": platform.python_version(),
        "guest_torch": torch.__version__,
    }


def run(rule: str, dtype: str, distribution: str, rounding: str, rows: int) -> None:
    """One pass over a matrix of rows x SIDE, between two counts."""
    which, direction = RULES[rule], directions.parse(distribution)
    weight = (torch.arange(rows * SIDE) % 1000).sub(500).mul(1e-3).view(rows, SIDE).to(getattr(torch, dtype))
    member = Member(weight, 1, 0, "weight", {name: torch.ones(rows, SIDE) for name in which.states})
    coefs = torch.tensor([[[COEFS[rule][name]] for name in which.coefs]])
    shared = torch.tensor([[SCALARS[name] for name in which.scalars]])
    seeds = torch.tensor(ROUNDING_SEEDS) if rounding == "stochastic" else None
    numbers = PassNumbers(torch.tensor([5]), coefs, shared, seeds)
    pass_, sweep = Passes(direction, "cpu"), Sweep([member])
    _syscall(MARKER, 0, 0)
    pass_.run(sweep, PassSpec(which, direction, rounding), numbers)
    _syscall(MARKER, 0, 0)


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps(count_module()), flush=True)
    for case in passes():
        for rows in (SIDE, 2 * SIDE):
            run(*case, rows)


if __name__ == "__main__":
    main()
