"""A chain of passes as one Triton kernel: every stage in registers, each with its own rounding, one store at the end.

As kernels.py, program by program and tile by tile, and with its parts; a stage's numbers are found through a table of
addresses in device memory, so that one compiled kernel serves chains of any length. See passes/spec.py's Chain.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import _coefs, _grow, _key, _load_tile, _store_tile, _zeros_like, element_at, float_or
from .lowrank import FACTOR_COLUMNS, between_seeds, low_rank, matrix_at, rows_hold_blocks
from .noise import direction, rounding_bits
from .packed import fma, mul
from .rounding import round_nearest, round_stochastic
from .rules import finish, start_of_squares


@triton.jit
def _round_state(x, block, high, lanes, tensor_id, seed, STATE: tl.constexpr):
    """What a pass would store of a state, in float32 again."""
    if STATE.primitive_bitwidth == 16:
        s0, s1 = _key(seed + 1)
        x = round_stochastic(x, rounding_bits(block, high, lanes, tensor_id, s0, s1), STATE).to(tl.float32)
    return x


@triton.jit
def _stage(
    row, group, w, x, y, block, high, lanes, tensor_id, matrix, rank, start,
    RULE: tl.constexpr, A: tl.constexpr, HAS_G: tl.constexpr, HAS_V: tl.constexpr, NUM_SHARED: tl.constexpr,
    WRITTEN: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr, DISTRIBUTION: tl.constexpr, CUT: tl.constexpr,
    PACKED: tl.constexpr, UNFUSED: tl.constexpr,
):  # fmt: skip
    """One pass on the tile's weights and states in registers, rounded as it would be stored; row is the stage's."""
    seeds = tl.load(row).to(tl.pointer_type(tl.int64))
    coefs = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    shared = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + group * NUM_SHARED
    rounding_seed = tl.load(row + 3).to(tl.pointer_type(tl.int64))
    num_seeds = tl.load(row + 4).to(tl.int32)
    stochastic, square_of_sum, keep_second = tl.load(row + 6), tl.load(row + 7), tl.load(row + 8)
    p1, p2, p3 = float_or(shared, 1, NUM_SHARED), float_or(shared, 2, NUM_SHARED), float_or(shared, 3, NUM_SHARED)
    p4, p5, p6 = float_or(shared, 4, NUM_SHARED), float_or(shared, 5, NUM_SHARED), float_or(shared, 6, NUM_SHARED)
    num_coefs: tl.constexpr = (1 if A != "none" else 0) + (1 if HAS_G else 0) + (1 if HAS_V else 0)
    coefs += group * num_seeds * num_coefs

    w = mul(w, tl.load(shared), PACKED)
    a = _zeros_like(w)
    g = a
    squares = start_of_squares(p1, p2, RULE)
    v = a + tl.where(square_of_sum != 0, 0.0, squares)
    for k in range(num_seeds):
        if DISTRIBUTION == "lowrank":
            z = low_rank(matrix, rank, start, lanes, (tl.load(row + 9) + k) * between_seeds(matrix), CUT, PACKED)
        else:
            z = direction(block, high, lanes, tensor_id, *_key(seeds + k), DISTRIBUTION, PACKED)
        ca, cg, cv = _coefs(coefs, k, num_seeds, A, HAS_G, HAS_V)
        w, a, g, grown = _grow(w, a, g, v, z, ca, cg, cv, A, HAS_G, HAS_V, False, PACKED)
        if HAS_V:
            v = tl.where(square_of_sum != 0, fma(z, cv, v, PACKED), grown)
    if HAS_V:
        v = tl.where(square_of_sum != 0, fma(v, v, squares, PACKED), v)
    kept = y
    w, x, y = finish(w, a, g, v, x, y, p1, p2, p3, p4, p5, p6, RULE, True)
    if WRITTEN == 2:
        y = tl.where(keep_second != 0, kept, y)
    if DTYPE.primitive_bitwidth == 16:
        if stochastic != 0:
            r0, r1 = _key(rounding_seed)
            w = round_stochastic(w, rounding_bits(block, high, lanes, tensor_id, r0, r1), DTYPE).to(tl.float32)
        else:
            w = round_nearest(w, DTYPE, UNFUSED).to(tl.float32)
    if WRITTEN >= 1:
        x = _round_state(x, block, high, lanes, tensor_id, rounding_seed, STATE)
    if WRITTEN == 2:
        y = _round_state(y, block, high, lanes, tensor_id, rounding_seed, STATE)
    return w, x, y


@triton.jit
def _chain_tile(
    w_at, state0, state1, probe, tile, lanes, begin, end, first, high, tensor_id, group, stages, first_stage, fork,
    matrix, rank,
    RULE: tl.constexpr, A: tl.constexpr, HAS_G: tl.constexpr, HAS_V: tl.constexpr, NUM_SHARED: tl.constexpr,
    PERTURBATION: tl.constexpr, STATES: tl.constexpr, WRITTEN: tl.constexpr, KEEP_SECOND: tl.constexpr,
    FORK: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr, DISTRIBUTION: tl.constexpr,
    STAGE_COLUMNS: tl.constexpr, CUT: tl.constexpr, PACKED: tl.constexpr, UNFUSED: tl.constexpr,
):  # fmt: skip
    start = tile * (lanes.shape[0] * 8)
    block = first + tile * lanes.shape[0]
    w = _load_tile(w_at, start, lanes, begin, end, CUT, DTYPE)
    x = _zeros_like(w)
    y = x
    if STATES >= 1:
        x = _load_tile(state0, start, lanes, begin, end, CUT, STATE).to(tl.float32)
    if STATES == 2:
        y = _load_tile(state1, start, lanes, begin, end, CUT, STATE).to(tl.float32)
    for i in range(first_stage, fork):
        row = stages + i * STAGE_COLUMNS
        if PERTURBATION != RULE:
            if tl.load(row + 5) != 0:
                w, x, y = _stage(
                    row, group, w, x, y, block, high, lanes, tensor_id, matrix, rank, start,
                    PERTURBATION, "sum" if PERTURBATION == "scaled_axpy" else "direct", False, False, 1,
                    0, DTYPE, STATE, DISTRIBUTION, CUT, PACKED, UNFUSED,
                )  # fmt: skip
            else:
                w, x, y = _stage(
                    row, group, w, x, y, block, high, lanes, tensor_id, matrix, rank, start,
                    RULE, A, HAS_G, HAS_V, NUM_SHARED, WRITTEN, DTYPE, STATE, DISTRIBUTION, CUT, PACKED, UNFUSED,
                )  # fmt: skip
        else:
            w, x, y = _stage(
                row, group, w, x, y, block, high, lanes, tensor_id, matrix, rank, start,
                RULE, A, HAS_G, HAS_V, NUM_SHARED, WRITTEN, DTYPE, STATE, DISTRIBUTION, CUT, PACKED, UNFUSED,
            )  # fmt: skip
    if first_stage < fork:  # all exact: they have been rounded
        _store_tile(w_at, start, lanes, round_nearest(w, DTYPE), begin, end, CUT, DTYPE)
        if WRITTEN >= 1:
            _store_tile(state0, start, lanes, round_nearest(x, STATE), begin, end, CUT, STATE)
        if WRITTEN == 2 and not KEEP_SECOND:
            _store_tile(state1, start, lanes, round_nearest(y, STATE), begin, end, CUT, STATE)
    if FORK:  # noqa: SIM102 - decided by the compiler, the test below at run time
        if probe.to(tl.int64) != 0:
            w, x, y = _stage(
                stages + fork * STAGE_COLUMNS, group, w, x, y, block, high, lanes, tensor_id, matrix, rank, start,
                PERTURBATION, "sum" if PERTURBATION == "scaled_axpy" else "direct", False, False, 1,
                0, DTYPE, STATE, DISTRIBUTION, CUT, PACKED, UNFUSED,
            )  # fmt: skip
            _store_tile(probe, start, lanes, round_nearest(w, DTYPE), begin, end, CUT, DTYPE)


@triton.jit(do_not_specialize=["length", "values", "of_seed", "rank", "first_chunk"])
def chain_kernel(
    tensors, chunks, stages, enabled, length, factor_rows, values, of_seed, rank, first_chunk,
    RULE: tl.constexpr, A: tl.constexpr, HAS_G: tl.constexpr, HAS_V: tl.constexpr, NUM_SHARED: tl.constexpr,
    PERTURBATION: tl.constexpr, STATES: tl.constexpr, WRITTEN: tl.constexpr, KEEP_SECOND: tl.constexpr,
    FORK: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr, DISTRIBUTION: tl.constexpr,
    COLUMNS: tl.constexpr, PROBE: tl.constexpr, STAGE_COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    PACKED: tl.constexpr, UNFUSED: tl.constexpr,
):  # fmt: skip
    """stages: int64 [length, STAGE_COLUMNS], rows as native.stage_rows makes them."""
    fork = length - (1 if FORK else 0)
    first_stage = 0
    if enabled is not None:
        first_stage = tl.where(tl.load(enabled) == 0, fork, 0)
    if first_chunk is not None:
        chunks += 2 * first_chunk
    tensor = tl.load(chunks + 2 * tl.program_id(0))
    row = tensors + tensor * COLUMNS
    chunk = tl.load(chunks + 2 * tl.program_id(0) + 1)
    numel, offset = tl.load(row), tl.load(row + 1)
    tensor_id = tl.load((row + 2).to(tl.pointer_type(tl.uint32)))
    group = tl.load(row + 3)
    origin = chunk.to(tl.int64) * CHUNK - offset
    begin = tl.maximum(-origin, 0).to(tl.int32)
    end = tl.minimum(numel - origin, CHUNK).to(tl.int32)
    item: tl.constexpr = DTYPE.primitive_bitwidth // 8
    w_at = element_at(row + 6, origin, DTYPE)
    state0, state1 = element_at(row + 7, origin, STATE), element_at(row + 8, origin, STATE)
    has_probe = tl.load(row + PROBE)
    probe = tl.where(has_probe != 0, has_probe + origin * item, 0).to(tl.pointer_type(DTYPE))
    first, high = chunk.to(tl.uint32) * (CHUNK // 8), chunk.to(tl.uint32) // (2**32 // (CHUNK // 8))

    lanes = tl.arange(0, BLOCK)
    tile_begin, tile_end = begin // (BLOCK * 8), tl.cdiv(end, BLOCK * 8)
    whole_begin = tl.cdiv(begin, BLOCK * 8)
    whole_end = tl.where(tl.load(row + 4) != 0, tl.maximum(end // (BLOCK * 8), whole_begin), whole_begin)
    matrix = None
    if DISTRIBUTION == "lowrank":
        matrix = matrix_at(factor_rows + tensor * FACTOR_COLUMNS, values, of_seed, chunk, CHUNK)
        whole_end = tl.where(rows_hold_blocks(matrix), whole_end, whole_begin)
    for tile in range(whole_begin, whole_end):
        _chain_tile(
            w_at, state0, state1, probe, tile, lanes, begin, end, first, high, tensor_id, group, stages, first_stage, fork,
            matrix, rank, RULE, A, HAS_G, HAS_V, NUM_SHARED, PERTURBATION, STATES, WRITTEN, KEEP_SECOND, FORK,
            DTYPE, STATE, DISTRIBUTION, STAGE_COLUMNS, False, PACKED, UNFUSED,
        )  # fmt: skip
    for cut in range(tile_begin, tile_end - (whole_end - whole_begin)):
        _chain_tile(
            w_at, state0, state1, probe, cut + tl.where(cut >= whole_begin, whole_end - whole_begin, 0), lanes,
            begin, end, first, high, tensor_id, group, stages, first_stage, fork,
            matrix, rank, RULE, A, HAS_G, HAS_V, NUM_SHARED, PERTURBATION, STATES, WRITTEN, KEEP_SECOND, FORK,
            DTYPE, STATE, DISTRIBUTION, STAGE_COLUMNS, True, False, UNFUSED,
        )  # fmt: skip
