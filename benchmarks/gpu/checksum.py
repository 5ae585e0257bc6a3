"""The exhaustive checksum of the noise: all 2^32 words through every backend's transform, against the known value.

python -m benchmarks.gpu.checksum --device cuda     # the CUDA and the Triton kernel
python -m benchmarks.gpu.checksum --device cpu --words 65536    # a part, against the compiled CPU backend
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import study

WORDS = 1 << 32
EXPECTED = 0x689CC1A256A1D052  # docs/noise.md


def checksums(device: Any, first: int) -> dict[str, int]:
    """Of the words from `first` on, by each backend that runs here; prints why another does not."""
    import torch

    from zokern import backends
    from zokern.backends import native

    found = {}
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
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    words = (WORDS, "sum over the last so many words")
    parser = study.parser(__doc__, "where the JSON goes", device=study.DEVICES, words=words)
    options = parser.parse_args(arguments)
    if not 1 <= options.words <= WORDS:
        parser.error(f"--words is {options.words}; it must be in [1, 2^32]")
    device, first, wanted = study.torch_device(options.device), WORDS - options.words, EXPECTED

    import torch

    from zokern.backends import native
    from zokern.bench import record

    if first > 0:
        cpu_set = native.extension.cpu_instruction_sets()[0]
        wanted = native.extension.cpu_normal_checksum(first, WORDS, torch.get_num_threads(), cpu_set)
    found = checksums(device, first)
    results = {name: {"sum": f"{value:016x}", "right": value == wanted} for name, value in found.items()}
    for name, made in results.items():
        print(f"{name}: {options.words:,} words: {made['sum']}, {'right' if made['right'] else f'NOT {wanted:016x}'}")
    if options.output:
        settings = {"words": options.words, "wanted": f"{wanted:016x}"}
        record.store("checksum", device, settings, results, options.output)
    missing = options.device == "cuda" and len(found) < 2
    return int(missing or not found or not all(made["right"] for made in results.values()))


if __name__ == "__main__":
    sys.exit(main())
