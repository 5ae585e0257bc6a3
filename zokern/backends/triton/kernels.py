"""A pass of any rule over a chunk table, as one Triton kernel; the first-order one is round(decay*src + sum_k coef_k z_k).

One program per chunk of CHUNK consecutive global indices; all tensors of a call in one launch. The chunk is walked in
tiles of BLOCK blocks of 8 elements. Tiles that lie wholly in the tensor and on 16-byte boundaries take 16-byte
accesses; others are masked element by element. Neither the tile's size nor the path taken changes a bit of the result.
Arithmetic is float32 with one rounding at the end; sources and noise: see noise.py and docs/noise.md.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from .lowrank import FACTOR_COLUMNS, between_seeds, low_rank, matrix_at, rows_hold_blocks
from .noise import direction, normal_halves, rounding_bits
from .packed import apart, fma, mul, together
from .rounding import round_nearest, round_stochastic
from .rules import finish, start_of_squares


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
def _zeros_like(w):
    """Zeros in the layout of w. That of plain zeros is another, and sums in it would be swapped through shared memory,
    all noise made twice. Triton keeps these operations while it chooses layouts; the code generator sees through them."""
    return ((w.to(tl.uint32, bitcast=True) & 1) >> 1).to(tl.float32, bitcast=True)


@triton.jit
def element_at(pointer, origin, DTYPE: tl.constexpr):
    """The address of element `origin` of a tensor, whose own address is stored at `pointer`."""
    item: tl.constexpr = DTYPE.primitive_bitwidth // 8
    return (tl.load(pointer) + origin * item).to(tl.pointer_type(DTYPE))


@triton.jit
def float_or(pointer, i: tl.constexpr, NUM: tl.constexpr):
    """The number at place i, 0 where there are only NUM."""
    if i < NUM:
        x = tl.load(pointer + i)
    else:
        x = 0.0
    return x


@triton.jit
def _key(seed):
    """The two words, low first, of the int64 seed at this address: never cut from 64 bits (see noise.philox)."""
    words = seed.to(tl.pointer_type(tl.uint32))
    return tl.load(words), tl.load(words + 1)


@triton.jit
def _rounding_keys(rounding_seed, ROUNDING: tl.constexpr, WRITTEN: tl.constexpr, STATE: tl.constexpr):
    """Of the weights' rounding and of a 16-bit state's; 0 where nothing is rounded."""
    r0, r1, s0, s1 = 0, 0, 0, 0
    if ROUNDING == "stochastic":
        r0, r1 = _key(rounding_seed)
    if WRITTEN >= 1 and STATE.primitive_bitwidth == 16:
        s0, s1 = _key(rounding_seed + 1)
    return r0, r1, s0, s1


@triton.jit
def _grow(
    w, a, g, v, z, ca, cg, cv,
    A: tl.constexpr, HAS_G: tl.constexpr, HAS_V: tl.constexpr, SQUARE_OF_SUM: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One direction more: A onto the weight or into its own sum, G, and V of z^2 or, to be squared later, of z."""
    if A == "direct":
        w = fma(z, ca, w, PACKED)
    elif A == "sum":
        a = fma(z, ca, a, PACKED)
    else:
        tl.static_assert(A == "none", "a rule's A is direct, sum or none")
    if HAS_G:
        g = fma(z, cg, g, PACKED)
    if HAS_V:
        v = fma(z if SQUARE_OF_SUM else mul(z, z, PACKED), cv, v, PACKED)
    return w, a, g, v


@triton.jit
def _coefs(coefs, k, num_seeds, A: tl.constexpr, HAS_G: tl.constexpr, HAS_V: tl.constexpr):
    """A's, G's and V's coefficient of direction k; the array has those that the rule has, in this order."""
    ca, cg, cv = 0.0, 0.0, 0.0
    if A != "none":
        ca = tl.load(coefs + k)
        coefs += num_seeds
    if HAS_G:
        cg = tl.load(coefs + k)
        coefs += num_seeds
    if HAS_V:
        cv = tl.load(coefs + k)
    return ca, cg, cv


@triton.jit
def _grow_apart(
    w, a, g, v, block, high, lanes, tensor_id, k0, k1, ca, cg, cv, seeds, coefs, num_seeds,
    A: tl.constexpr, HAS_G: tl.constexpr, HAS_V: tl.constexpr, SQUARE_OF_SUM: tl.constexpr,
):  # fmt: skip
    """All directions of normals, as in `_tile`, with cosines and sines apart.

    LLVM makes pairs of neighbours that are computed alike, and a cosine's neighbour is its sine, which is not: of 16-bit
    weights it pairs next to nothing. Loops over tensors of one kind each show it the others.
    """
    w0, w1 = apart(w)
    a0, a1 = apart(a)
    g0, g1 = apart(g)
    v0, v1 = apart(v)
    z0, z1 = normal_halves(block, high, lanes, tensor_id, k0, k1)
    w0, a0, g0, v0 = _grow(w0, a0, g0, v0, z0, ca, cg, cv, A, HAS_G, HAS_V, SQUARE_OF_SUM, False)
    w1, a1, g1, v1 = _grow(w1, a1, g1, v1, z1, ca, cg, cv, A, HAS_G, HAS_V, SQUARE_OF_SUM, False)
    for k in range(1, num_seeds):
        z0, z1 = normal_halves(block, high, lanes, tensor_id, *_key(seeds + k))
        da, dg, dv = _coefs(coefs, k, num_seeds, A, HAS_G, HAS_V)
        w0, a0, g0, v0 = _grow(w0, a0, g0, v0, z0, da, dg, dv, A, HAS_G, HAS_V, SQUARE_OF_SUM, False)
        w1, a1, g1, v1 = _grow(w1, a1, g1, v1, z1, da, dg, dv, A, HAS_G, HAS_V, SQUARE_OF_SUM, False)
    return together(w0, w1), together(a0, a1), together(g0, g1), together(v0, v1)


@triton.jit
def _tile(
    src, dst, state0, state1, tile, lanes, begin, end, first, high, tensor_id, decay, p1, p2, p3, p4, p5, p6,
    k0, k1, ca, cg, cv, seeds, coefs, num_seeds, r0, r1, s0, s1, matrix, rank,
    RULE: tl.constexpr, A: tl.constexpr, HAS_G: tl.constexpr, HAS_V: tl.constexpr,
    STATES: tl.constexpr, WRITTEN: tl.constexpr, SQUARE_OF_SUM: tl.constexpr,
    DTYPE: tl.constexpr, STATE: tl.constexpr, DISTRIBUTION: tl.constexpr, ROUNDING: tl.constexpr,
    HAS_NOISE: tl.constexpr, CUT: tl.constexpr, PACKED: tl.constexpr, APART: tl.constexpr, UNFUSED: tl.constexpr,
):  # fmt: skip
    """One tile: load, take every direction in registers, apply the rule, round once, store."""
    start = tile * (lanes.shape[0] * 8)
    block = first + tile * lanes.shape[0]
    w = mul(_load_tile(src, start, lanes, begin, end, CUT, DTYPE), decay, PACKED)
    a = _zeros_like(w)
    g = a
    squares = start_of_squares(p1, p2, RULE)
    v = a if SQUARE_OF_SUM else a + squares
    if HAS_NOISE and DISTRIBUTION == "lowrank":
        k, of_seed = 0, between_seeds(matrix)
        for to_seed in range(of_seed * 0, num_seeds * of_seed, of_seed):
            z = low_rank(matrix, rank, start, lanes, to_seed, CUT, PACKED)
            da, dg, dv = _coefs(coefs, k, num_seeds, A, HAS_G, HAS_V)
            w, a, g, v = _grow(w, a, g, v, z, da, dg, dv, A, HAS_G, HAS_V, SQUARE_OF_SUM, PACKED)
            k += 1  # noqa: SIM113 - compiled code has no enumerate
    elif HAS_NOISE and APART:
        w, a, g, v = _grow_apart(
            w, a, g, v, block, high, lanes, tensor_id, k0, k1, ca, cg, cv, seeds, coefs, num_seeds,
            A, HAS_G, HAS_V, SQUARE_OF_SUM,
        )  # fmt: skip
    elif HAS_NOISE:
        # The first direction is apart so that its seed, and all that depends on it alone, leaves the loop over tiles.
        z = direction(block, high, lanes, tensor_id, k0, k1, DISTRIBUTION, PACKED)
        w, a, g, v = _grow(w, a, g, v, z, ca, cg, cv, A, HAS_G, HAS_V, SQUARE_OF_SUM, PACKED)
        for k in range(1, num_seeds):
            z = direction(block, high, lanes, tensor_id, *_key(seeds + k), DISTRIBUTION, PACKED)
            da, dg, dv = _coefs(coefs, k, num_seeds, A, HAS_G, HAS_V)
            w, a, g, v = _grow(w, a, g, v, z, da, dg, dv, A, HAS_G, HAS_V, SQUARE_OF_SUM, PACKED)
    if SQUARE_OF_SUM:
        v = fma(v, v, squares, PACKED)
    x, y = a, a
    if STATES >= 1:
        x = _load_tile(state0, start, lanes, begin, end, CUT, STATE)
    if STATES == 2:
        y = _load_tile(state1, start, lanes, begin, end, CUT, STATE)
    w, x, y = finish(w, a, g, v, x, y, p1, p2, p3, p4, p5, p6, RULE, HAS_NOISE)
    if ROUNDING == "stochastic":
        out = round_stochastic(w, rounding_bits(block, high, lanes, tensor_id, r0, r1), DTYPE)
    elif ROUNDING == "nearest":
        out = round_nearest(w, DTYPE, UNFUSED)
    else:
        tl.static_assert(False, "pass_kernel does not know the rounding " + ROUNDING)
    _store_tile(dst, start, lanes, out, begin, end, CUT, DTYPE)
    if WRITTEN >= 1:
        if STATE.primitive_bitwidth == 16:
            x = round_stochastic(x, rounding_bits(block, high, lanes, tensor_id, s0, s1), STATE)
        _store_tile(state0, start, lanes, x, begin, end, CUT, STATE)
    if WRITTEN == 2:
        _store_tile(state1, start, lanes, y, begin, end, CUT, STATE)


@triton.jit(do_not_specialize=["num_seeds", "values", "of_seed", "rank", "first_chunk"])
def pass_kernel(
    tensors, chunks, seeds, coefs, shared, rounding_seed, enabled, num_seeds,
    factor_rows, values, of_seed, rank, first_chunk,
    RULE: tl.constexpr, A: tl.constexpr, HAS_G: tl.constexpr, HAS_V: tl.constexpr, NUM_SHARED: tl.constexpr,
    STATES: tl.constexpr, WRITTEN: tl.constexpr, SQUARE_OF_SUM: tl.constexpr,
    DTYPE: tl.constexpr, STATE: tl.constexpr, DISTRIBUTION: tl.constexpr, ROUNDING: tl.constexpr,
    HAS_NOISE: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
    APART: tl.constexpr, UNFUSED: tl.constexpr,
):  # fmt: skip
    """Arguments as in launch.run, num_seeds = K at run time; HAS_NOISE is K > 0. A: "direct", "sum" or "none". APART: of
    normals, which way whole tiles take; the bits are the same.

    factor_rows .. first_chunk: of a piece where DISTRIBUTION is "lowrank", None else."""
    if enabled is not None:  # noqa: SIM102 - decided by the compiler, the test below at run time
        if tl.load(enabled) == 0:
            return
    if first_chunk is not None:
        chunks += 2 * first_chunk
    tensor = tl.load(chunks + 2 * tl.program_id(0))
    row = tensors + tensor * COLUMNS
    chunk = tl.load(chunks + 2 * tl.program_id(0) + 1)
    numel, offset = tl.load(row), tl.load(row + 1)
    tensor_id = tl.load((row + 2).to(tl.pointer_type(tl.uint32)))
    group = tl.load(row + 3)

    # 64-bit arithmetic ends here: below, elements are counted from the chunk's first, which the addresses point at.
    origin = chunk.to(tl.int64) * CHUNK - offset
    begin = tl.maximum(-origin, 0).to(tl.int32)
    end = tl.minimum(numel - origin, CHUNK).to(tl.int32)
    src, dst = element_at(row + 5, origin, DTYPE), element_at(row + 6, origin, DTYPE)
    state0, state1 = element_at(row + 7, origin, STATE), element_at(row + 8, origin, STATE)
    first, high = chunk.to(tl.uint32) * (CHUNK // 8), chunk.to(tl.uint32) // (2**32 // (CHUNK // 8))

    lanes = tl.arange(0, BLOCK)
    shared += group * NUM_SHARED
    decay = tl.load(shared)
    p1, p2, p3 = float_or(shared, 1, NUM_SHARED), float_or(shared, 2, NUM_SHARED), float_or(shared, 3, NUM_SHARED)
    p4, p5, p6 = float_or(shared, 4, NUM_SHARED), float_or(shared, 5, NUM_SHARED), float_or(shared, 6, NUM_SHARED)
    num_coefs: tl.constexpr = (1 if A != "none" else 0) + (1 if HAS_G else 0) + (1 if HAS_V else 0)
    coefs += group * num_seeds * num_coefs
    if HAS_NOISE:
        ca, cg, cv = _coefs(coefs, 0, num_seeds, A, HAS_G, HAS_V)
        k0, k1 = _key(seeds)
    else:
        k0, k1, ca, cg, cv = 0, 0, 0.0, 0.0, 0.0
    r0, r1, s0, s1 = _rounding_keys(rounding_seed, ROUNDING, WRITTEN, STATE)
    matrix = None
    if DISTRIBUTION == "lowrank":
        matrix = matrix_at(factor_rows + tensor * FACTOR_COLUMNS, values, of_seed, chunk, CHUNK)

    # Tiles [whole_begin, whole_end) are whole and aligned; the rest of [tile_begin, tile_end) is masked. Where a block of a
    # low-rank direction may lie in two rows, all are.
    tile_begin, tile_end = begin // (BLOCK * 8), tl.cdiv(end, BLOCK * 8)
    whole_begin = tl.cdiv(begin, BLOCK * 8)
    whole_end = tl.where(tl.load(row + 4) != 0, tl.maximum(end // (BLOCK * 8), whole_begin), whole_begin)
    if DISTRIBUTION == "lowrank":
        whole_end = tl.where(rows_hold_blocks(matrix), whole_end, whole_begin)
    for tile in range(whole_begin, whole_end):
        _tile(
            src, dst, state0, state1, tile, lanes, begin, end, first, high, tensor_id, decay, p1, p2, p3, p4, p5, p6,
            k0, k1, ca, cg, cv, seeds, coefs, num_seeds, r0, r1, s0, s1, matrix, rank,
            RULE, A, HAS_G, HAS_V, STATES, WRITTEN, SQUARE_OF_SUM,
            DTYPE, STATE, DISTRIBUTION, ROUNDING, HAS_NOISE, False, PACKED, APART, UNFUSED,
        )  # fmt: skip
    for cut in range(tile_begin, tile_end - (whole_end - whole_begin)):
        _tile(
            src, dst, state0, state1, cut + tl.where(cut >= whole_begin, whole_end - whole_begin, 0), lanes,
            begin, end, first, high, tensor_id, decay, p1, p2, p3, p4, p5, p6,
            k0, k1, ca, cg, cv, seeds, coefs, num_seeds, r0, r1, s0, s1, matrix, rank,
            RULE, A, HAS_G, HAS_V, STATES, WRITTEN, SQUARE_OF_SUM,
            DTYPE, STATE, DISTRIBUTION, ROUNDING, HAS_NOISE, True, False, False, UNFUSED,
        )  # fmt: skip
