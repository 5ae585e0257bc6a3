"""The pass dst <- round(decay[g]*src + sum_k coef[g,k] z(seed_k)) over a chunk table, as one Triton kernel.

One program per chunk of CHUNK consecutive global indices; all tensors of a call in one launch. The chunk is walked in
tiles of BLOCK blocks of 8 elements. Tiles that lie wholly in the tensor and on 16-byte boundaries take 16-byte
accesses; others are masked element by element. Neither the tile's size nor the path taken changes a bit of the result.
Arithmetic is float32 with one rounding at the end; sources and noise: see noise.py and docs/noise.md.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from .noise import direction, rounding_bits
from .rounding import round_nearest, round_stochastic


@triton.jit
def _addresses(pointer, offsets, CUT: tl.constexpr):
    """Addresses of [BLOCK, n] elements; in a whole tile each row is one 16-byte access, which Triton must be told."""
    if CUT:
        address = pointer + offsets
    else:
        # Counted in bytes, because the compiler would scale the index of elements in 64 bits: 1.5 slots an element.
        item: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
        address = (pointer.to(tl.pointer_type(tl.int8)) + offsets * item).to(pointer.dtype)
        address = tl.max_contiguous(tl.multiple_of(address, (item, 16)), (1, offsets.shape[1]))
    return address


@triton.jit
def _load_part(pointer, offsets, begin, end, CUT: tl.constexpr):
    if CUT:
        x = tl.load(_addresses(pointer, offsets, CUT), mask=(offsets >= begin) & (offsets < end), other=0.0)
    else:
        x = tl.load(_addresses(pointer, offsets, CUT))
    return x


@triton.jit
def _store_part(pointer, offsets, x, begin, end, CUT: tl.constexpr):
    if CUT:
        tl.store(_addresses(pointer, offsets, CUT), x, mask=(offsets >= begin) & (offsets < end))
    else:
        tl.store(_addresses(pointer, offsets, CUT), x)


# 16 bytes hold a lane's eight 16-bit elements, but only four of its eight float32. Those go as two accesses, joined in
# registers; one access of 32 bytes would make Triton choose a layout other than the noise's, and swap through memory.
@triton.jit
def _load_tile(pointer, start, lanes, begin, end, CUT: tl.constexpr, DTYPE: tl.constexpr):
    """The tile's eight elements per lane, from index `start` of the chunk, as [BLOCK, 8] float32."""
    if DTYPE.primitive_bitwidth == 32:
        offsets = start + lanes[:, None] * 8 + tl.arange(0, 4)[None, :]
        low = _load_part(pointer, offsets, begin, end, CUT)
        high = _load_part(pointer, offsets + 4, begin, end, CUT)
        x = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), [lanes.shape[0], 8])
    else:
        offsets = start + lanes[:, None] * 8 + tl.arange(0, 8)[None, :]
        x = _load_part(pointer, offsets, begin, end, CUT).to(tl.float32)
    return x


@triton.jit
def _store_tile(pointer, start, lanes, x, begin, end, CUT: tl.constexpr, DTYPE: tl.constexpr):
    if DTYPE.primitive_bitwidth == 32:
        offsets = start + lanes[:, None] * 8 + tl.arange(0, 4)[None, :]
        low, high = tl.split(tl.permute(tl.reshape(x, [lanes.shape[0], 2, 4]), (0, 2, 1)))
        _store_part(pointer, offsets, low, begin, end, CUT)
        _store_part(pointer, offsets + 4, high, begin, end, CUT)
    else:
        offsets = start + lanes[:, None] * 8 + tl.arange(0, 8)[None, :]
        _store_part(pointer, offsets, x, begin, end, CUT)


@triton.jit
def _key(seed):
    """The two words, low first, of the int64 seed at this address: never cut from 64 bits (see noise.philox)."""
    words = seed.to(tl.pointer_type(tl.uint32))
    return tl.load(words), tl.load(words + 1)


@triton.jit
def _tile(
    src, dst, tile, lanes, begin, end, first, high, tensor_id, decay,
    k0, k1, coef0, seeds, coefs, num_seeds, r0, r1,
    DTYPE: tl.constexpr, DISTRIBUTION: tl.constexpr, ROUNDING: tl.constexpr,
    HAS_NOISE: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """One tile: load, accumulate every direction in registers, round once, store."""
    start = tile * (lanes.shape[0] * 8)
    block = first + tile * lanes.shape[0]
    acc = decay * _load_tile(src, start, lanes, begin, end, CUT, DTYPE)
    if HAS_NOISE:
        # The first direction is apart so that its seed, and all that depends on it alone, leaves the loop over tiles.
        acc = tl.fma(coef0, direction(block, high, lanes, tensor_id, k0, k1, DISTRIBUTION), acc)
        for k in range(1, num_seeds):
            z = direction(block, high, lanes, tensor_id, *_key(seeds + k), DISTRIBUTION)
            acc = tl.fma(tl.load(coefs + k), z, acc)
    if ROUNDING == "stochastic":
        out = round_stochastic(acc, rounding_bits(block, high, lanes, tensor_id, r0, r1), DTYPE)
    else:
        out = round_nearest(acc, DTYPE)
    _store_tile(dst, start, lanes, out, begin, end, CUT, DTYPE)


@triton.jit(do_not_specialize=["num_seeds"])
def add_noise_kernel(
    tensors, chunks, seeds, coefs, decays, rounding_seed, enabled, num_seeds,
    DTYPE: tl.constexpr, DISTRIBUTION: tl.constexpr, ROUNDING: tl.constexpr,
    HAS_NOISE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Arguments as in launch.add_noise, num_seeds = K at run time; HAS_NOISE is K > 0."""
    if enabled is not None:  # noqa: SIM102 - decided by the compiler, the test below at run time
        if tl.load(enabled) == 0:
            return
    row = tensors + tl.load(chunks + 2 * tl.program_id(0)) * 8
    chunk = tl.load(chunks + 2 * tl.program_id(0) + 1)
    numel, offset = tl.load(row), tl.load(row + 1)
    tensor_id = tl.load((row + 2).to(tl.pointer_type(tl.uint32)))
    group = tl.load(row + 3)

    # 64-bit arithmetic ends here: below, elements are counted from the chunk's first, which the addresses point at.
    origin = chunk.to(tl.int64) * CHUNK - offset
    begin = tl.maximum(-origin, 0).to(tl.int32)
    end = tl.minimum(numel - origin, CHUNK).to(tl.int32)
    item: tl.constexpr = DTYPE.primitive_bitwidth // 8
    src = (tl.load(row + 5) + origin * item).to(tl.pointer_type(DTYPE))
    dst = (tl.load(row + 6) + origin * item).to(tl.pointer_type(DTYPE))
    first, high = chunk.to(tl.uint32) * (CHUNK // 8), chunk.to(tl.uint32) // (2**32 // (CHUNK // 8))

    lanes = tl.arange(0, BLOCK)
    decay = tl.load(decays + group)
    coefs += group * num_seeds
    if HAS_NOISE:
        coef0 = tl.load(coefs)
        k0, k1 = _key(seeds)
    else:
        k0, k1, coef0 = 0, 0, 0.0
    if ROUNDING == "stochastic":
        r0, r1 = _key(rounding_seed)
    else:
        r0, r1 = 0, 0

    # Tiles [whole_begin, whole_end) are whole and aligned; the rest of [tile_begin, tile_end) is masked.
    tile_begin, tile_end = begin // (BLOCK * 8), tl.cdiv(end, BLOCK * 8)
    whole_begin = tl.cdiv(begin, BLOCK * 8)
    whole_end = tl.where(tl.load(row + 4) != 0, tl.maximum(end // (BLOCK * 8), whole_begin), whole_begin)
    for tile in range(whole_begin, whole_end):
        _tile(
            src, dst, tile, lanes, begin, end, first, high, tensor_id, decay,
            k0, k1, coef0, seeds, coefs, num_seeds, r0, r1,
            DTYPE, DISTRIBUTION, ROUNDING, HAS_NOISE, False,
        )  # fmt: skip
    for cut in range(tile_begin, tile_end - (whole_end - whole_begin)):
        _tile(
            src, dst, cut + tl.where(cut >= whole_begin, whole_end - whole_begin, 0), lanes,
            begin, end, first, high, tensor_id, decay,
            k0, k1, coef0, seeds, coefs, num_seeds, r0, r1,
            DTYPE, DISTRIBUTION, ROUNDING, HAS_NOISE, True,
        )  # fmt: skip
