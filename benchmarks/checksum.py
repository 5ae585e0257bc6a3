"""The exhaustive checksum of the noise: all 2^32 words through every backend's transform, against the known value.

python benchmarks/checksum.py --device cuda     # the CUDA and the Triton kernel
python benchmarks/checksum.py --device cpu --words 65536    # a part, against the compiled CPU backend
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORDS = 1 << 32
EXPECTED = 0x689CC1A256A1D052  # docs/noise.md


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--words", type=int, default=WORDS, help="sum over the last so many words (default: 2^32)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the JSON goes")
    options = parser.parse_args(arguments)
    if not 1 <= options.words <= WORDS:
        parser.error(f"--words is {options.words}; it must be in [1, 2^32]")
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    sys.path.insert(0, str(ROOT))  # zokern may not be installed
    import torch

    from zokern import backends
    from zokern.backends import native
    from zokern.bench import record

    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    first, found = WORDS - options.words, {}
    cpu_set = native.extension.cpu_instruction_sets()[0]
    wanted = EXPECTED
    if options.words < WORDS:
        wanted = native.extension.cpu_normal_checksum(first, WORDS, torch.get_num_threads(), cpu_set)
    for name in ("cuda", "triton"):
        if (reason := backends.unavailable_reason(name, device)) is not None:
            print(f"{name}: not run: {reason}")
        elif name == "cuda":
            total = torch.zeros(1, dtype=torch.int64, device=device)
            stream = torch.cuda.current_stream(device).cuda_stream
            native.extension.cuda_normal_checksum(first, WORDS, total.data_ptr(), 0, stream)
            found[name] = int(total) % 2**64
        else:
            from zokern.backends.triton.checksum import normal_checksum

            found[name] = normal_checksum(first, WORDS, device)
    for name, value in found.items():
        print(f"{name}: {options.words:,} words: {value:016x}, {'right' if value == wanted else f'NOT {wanted:016x}'}")
    if options.output:
        results = {name: {"sum": f"{value:016x}", "right": value == wanted} for name, value in found.items()}
        settings = {"words": options.words, "wanted": f"{wanted:016x}"}
        record.store("checksum", device, settings, results, options.output)
    wrong = [name for name, value in found.items() if value != wanted]
    missing = options.device == "cuda" and len(found) < 2
    return int(bool(wrong) or not found or missing)


if __name__ == "__main__":
    sys.exit(main())
