"""Counts what a kernel costs in machine code, without a GPU: issue slots per element, registers, spills, access widths.

python -m benchmarks.machine_code               # compiles for sm_90 and prints a table
python -m benchmarks.machine_code --arch gfx942 # Triton's passes for AMD's MI300X
python -m benchmarks.machine_code --measure     # all of them, half an hour, into benchmarks/results/machine_code.json

A pass over 16-bit weights is at an H200's copy bandwidth only if it needs about 30 issue slots per element, so this is
measured where it can be kept: in the compiled code. listing.py reads it, counts.py and amd.py say what is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import amd, rows
from .amd import AMD
from .compilers import CUDA_SOURCES, compile_cuda, compile_triton, triton_passes
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


def architecture(text: str) -> int | str:
    """Of --arch: a compute capability, or a name of AMD's.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    if (found := amd.architecture(text)) is not None:
        return found
    known = ", ".join(f"{name} ({gpu})" for name, gpu in AMD.items())
    raise argparse.ArgumentTypeError(f"{text!r} is no architecture: give a compute capability such as 90, or {known}")


def pattern(text: str) -> str:
    """Of --only.

    Raises:
        argparse.ArgumentTypeError: for what is no regular expression, or is found in no kernel's name.
    """
    try:
        found = [name for name, *_ in triton_passes() if re.search(text, name)]
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is in no kernel's name; one is {triton_passes()[0][0]!r}")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.machine_code", description=__doc__, epilog="nvcc is for cuda only.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--arch", type=architecture, nargs="+", default=[90],
                        help=f"compute capabilities, {', '.join(AMD)} (default: 90)")  # fmt: skip
    parser.add_argument("--kernels", nargs="+", choices=["triton", "cuda"],
                        help="which kernels to compile (default: both, and Triton's for AMD)")  # fmt: skip
    parser.add_argument("--only", type=pattern, metavar="PATTERN",
                        help="of Triton's kernels those in whose name this is found: 'axpy<bf16'")  # fmt: skip
    parser.add_argument("--source", type=Path, nargs="+", default=CUDA_SOURCES,
                        help="the .cu files (default: all with kernels of passes)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all counts to FILE")
    parser.add_argument("--measure", action="store_true", help="store every kernel on every architecture instead")
    options = parser.parse_args(arguments)
    kernels = options.kernels or ["triton", "cuda"]
    if of_amd := [arch for arch in options.arch if arch in AMD and "cuda" in (options.kernels or ())]:
        parser.error(f"CUDA's kernels are not compiled for {', '.join(of_amd)}, which are AMD's: take --kernels triton")
    if "triton" in kernels and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, so Triton would not compile: unset it")
    if options.measure:
        rows.measure()
        print(f"stored in {rows.STORED}; now python -m benchmarks.pages")
        return 0
    reports: list[Report] = []
    for arch in options.arch:
        if "triton" in kernels:
            reports += compile_triton(arch, options.only or "")
        if "cuda" in kernels and arch not in AMD:
            for source in options.source:
                reports += compile_cuda(source, arch)
    print(table(reports))
    if options.json:
        options.json.write_text(json.dumps(reports, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
