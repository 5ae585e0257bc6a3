"""Small passes of every kind, for compute-sanitizer to watch; their bits are checked against the reference too.

compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitizer --device cuda
python -m benchmarks.gpu.sanitizer --device cpu --backends cpu     # without a GPU: the program itself

A tensor of some thousand elements has whole and cut chunks, tiles and blocks, and tensors off 16-byte boundaries: every
path of a kernel. Set PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation whose ends the tool knows.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence

from benchmarks import study

AT_LEAST = 10  # cases, however little time is left: with none, nothing was watched
ELEMENTS = 26_000  # three quarters of it are more than a chunk of 2^14


def main(arguments: Sequence[str] | None = None) -> int:
    begin = time.monotonic()  # before torch comes, which is what takes long under a tool
    parser = study.parser(
        __doc__, None, device=study.DEVICES, backends=(["cuda", "triton"], "default: cuda triton"),
        elements=(ELEMENTS, "of a case, about"), cases=(int, "no more than so many cases"),
        triton_cases=(24, "of Triton, which compiles each"),
        time_limit=(float("inf"), f"seconds from the start; after {AT_LEAST} cases, begin no other later"),
    )  # fmt: skip
    options = parser.parse_args(arguments)
    device = study.torch_device(options.device)

    from benchmarks.gpu import cases

    cases.require(parser, options.backends, device)
    chosen = list(cases.all_cases())
    random.Random(1).shuffle(chosen)  # a short run has some of every kind
    chosen = chosen[: options.cases]
    wrong, counts = 0, dict.fromkeys(options.backends, 0)
    for number, case in enumerate(chosen):
        if number >= AT_LEAST and time.monotonic() - begin > options.time_limit:
            print(f"time limit: {number} of {len(chosen)} cases")
            break
        backends = [name for name in options.backends if name != "triton" or number < options.triton_cases]
        # Made and compared on the CPU: of the GPU's kernels, ours alone are to be watched.
        for row in cases.compare(case, options.elements, cases.CPU, device, "reference", backends):
            counts[row["backend"]] += 1
            if row["different"]:
                wrong += 1
                print(f"WRONG: {row['backend']} differs in {row['different']} elements: {case.label()}")
    told = ", ".join(f"{count} of {name}" for name, count in counts.items())
    print(f"{told} passes, {wrong} with wrong bits, {time.monotonic() - begin:.0f} s")
    return int(wrong > 0 or not any(counts.values()))


if __name__ == "__main__":
    sys.exit(main())
