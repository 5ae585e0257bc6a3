"""Counts what a kernel costs in machine code, without a GPU: issue slots per element, registers, spills, access widths.

python -m benchmarks.machine_code               # compiles for sm_90 and prints a table
python -m benchmarks.machine_code --measure     # every architecture, minutes, into benchmarks/results/machine_code.json

A pass over 16-bit weights is at an H200's copy bandwidth only if it needs about 30 issue slots per element, so this is
measured where it can be kept: in the compiled code. listing.py reads it, counts.py says what is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import rows
from .compilers import CUDA_SOURCES, compile_cuda, compile_triton
from .counts import Report


def table(reports: Iterable[Report]) -> str:
    lines = [("kernel", "sm", "slots/elem", "per extra seed", "regs", "spills", "stack", "bars", "accesses", "pipes")]
    for r in reports:
        slots = ("-" if x is None else f"{x:.1f}" for x in (r["slots"], r["slots_per_extra_seed"]))
        counts = (str(r[key]) for key in ("registers", "spills", "stack_bytes", "barriers"))
        widths = ", ".join(f"{n}x{w}B" for w, n in sorted(Counter(r["accesses"]).items(), reverse=True))
        pipes = " ".join(f"{name}:{count:.3g}" for name, count in r["pipes"].items())
        lines.append((r["name"], str(r["arch"]), *slots, *counts, widths, pipes))
    columns = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(row, columns, strict=True)).rstrip() for row in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.machine_code", description=__doc__, epilog="nvcc is for cuda only.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--arch", type=int, nargs="+", default=[90], help="compute capabilities (default: 90)")
    parser.add_argument("--kernels", nargs="+", choices=["triton", "cuda"], default=["triton", "cuda"],
                        help="which kernels to compile (default: both)")  # fmt: skip
    parser.add_argument("--source", type=Path, nargs="+", default=CUDA_SOURCES,
                        help="the .cu files (default: all with kernels of passes)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all counts to FILE")
    parser.add_argument("--measure", action="store_true", help="store every kernel on every architecture instead")
    options = parser.parse_args(arguments)
    if "triton" in options.kernels and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, so Triton would not compile: unset it")
    if options.measure:
        rows.measure()
        print(f"stored in {rows.STORED}; now python -m benchmarks.pages")
        return 0
    reports: list[Report] = []
    for arch in options.arch:
        if "triton" in options.kernels:
            reports += compile_triton(arch)
        if "cuda" in options.kernels:
            for source in options.source:
                reports += compile_cuda(source, arch)
    print(table(reports))
    if options.json:
        options.json.write_text(json.dumps(reports, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
