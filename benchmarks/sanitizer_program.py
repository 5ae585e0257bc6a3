"""Small passes of every kind, for compute-sanitizer to watch; their bits are checked against the reference too.

compute-sanitizer --tool memcheck python benchmarks/sanitizer_program.py --device cuda
python benchmarks/sanitizer_program.py --device cpu --backends cpu     # without a GPU: the program itself

A tensor of some thousand elements has whole and cut chunks, tiles and blocks, and tensors off 16-byte boundaries: every
path of a kernel. Set PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation whose ends the tool knows.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AT_LEAST = 10  # cases, however little time is left: with none, nothing was watched
ELEMENTS = 26_000  # three quarters of it are more than a chunk of 2^14


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"], help="default: cuda triton")
    parser.add_argument("--elements", type=int, default=ELEMENTS, help=f"of a case, about (default: {ELEMENTS})")
    parser.add_argument("--cases", type=int, help="no more than so many cases")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS",
                        help=f"from the start; after {AT_LEAST} cases, begin no other later")  # fmt: skip
    parser.add_argument("--triton-cases", type=int, default=24, help="of Triton, which compiles each (default: 24)")
    options = parser.parse_args(arguments)
    begin = time.monotonic()  # before torch comes, which is what takes long under a tool
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    sys.path.insert(0, str(ROOT))  # zokern may not be installed
    import random

    import pass_cases
    import torch

    from zokern import backends

    device = torch.device("cuda", 0) if options.device == "cuda" else pass_cases.CPU
    for name in options.backends:
        if (reason := backends.unavailable_reason(name, device)) is not None:
            parser.error(f"backend {name} cannot run on {device}: {reason}")
    cases = list(pass_cases.all_cases())
    random.Random(1).shuffle(cases)  # a short run has some of every kind
    wrong, counts = 0, dict.fromkeys(options.backends, 0)
    for number, case in enumerate(cases[: options.cases]):
        if number >= AT_LEAST and time.monotonic() - begin > options.time_limit:
            print(f"time limit: {number} of {len(cases[: options.cases])} cases")
            break
        start = pass_cases.inputs(case, options.elements, pass_cases.CPU)
        wanted = pass_cases.apply(case, pass_cases.copy(start, pass_cases.CPU), "reference")
        for backend in options.backends:
            if backend == "triton" and number >= options.triton_cases:
                continue
            got = pass_cases.apply(case, pass_cases.copy(start, device), backend)
            different = sum(int(pass_cases.different(g.cpu(), w).sum()) for g, w in zip(got, wanted, strict=True))
            counts[backend] += 1
            if different:
                wrong += 1
                print(f"WRONG: {backend} differs in {different} elements: {case.label()}")
    told = ", ".join(f"{count} of {name}" for name, count in counts.items())
    print(f"{told} passes, {wrong} with wrong bits, {time.monotonic() - begin:.0f} s")
    return int(wrong > 0 or not any(counts.values()))


if __name__ == "__main__":
    sys.exit(main())
