"""The sum over 32-bit words that checks the whole transform of a word to two normals, not a sample of it.

sum over w of bits(z0) (2w + 1) + bits(z1) (2w + 2), mod 2^64; docs/noise.md has its value over all 2^32 words. Every
program writes its own part, so that there is no order of additions to think of: integers wrap around.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import _launch_context
from .noise import normal_pair

SIZE, TILES = 1024, 64  # words of a tile, tiles of a program


@triton.jit(do_not_specialize=["first", "last"])
def _checksum_kernel(parts, first, last, SIZE: tl.constexpr, TILES: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([SIZE], tl.uint64)
    for tile in range(TILES):
        w = first.to(tl.int64) + (program * TILES + tile) * SIZE + tl.arange(0, SIZE)
        z0, z1 = normal_pair(w.to(tl.uint32))
        term = z0.to(tl.uint32, bitcast=True).to(tl.uint64) * (2 * w + 1).to(tl.uint64)
        term += z1.to(tl.uint32, bitcast=True).to(tl.uint64) * (2 * w + 2).to(tl.uint64)
        total += tl.where(w < last, term, 0)
    tl.store(parts + program, tl.sum(total, axis=0).to(tl.int64, bitcast=True))


def normal_checksum(first: int, last: int, device: torch.device) -> int:
    """The sum over words first .. last-1 on `device`, in [0, 2^64). Waits for the device."""
    programs = triton.cdiv(last - first, SIZE * TILES)
    parts = torch.zeros(programs, dtype=torch.int64, device=device)
    with _launch_context(device):
        _checksum_kernel[(programs,)](
            parts, first, last, SIZE=SIZE, TILES=TILES, enable_fp_fusion=False, sanitize_overflow=False
        )
    return int(parts.sum()) % 2**64
