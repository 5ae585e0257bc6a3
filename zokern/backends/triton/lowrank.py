"""Directions of low rank in Triton: how their factors are made, and z of a tile from them. docs/noise.md has the contract.

An element's matrix, row and column come from its global index. Division takes 64 bits once for a chunk; inside it indices
are 32-bit: see `_steps`. Nothing outside of the factors is read.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from .noise import PURPOSE_LEFT, PURPOSE_RIGHT, normals
from .packed import fma, mul

FACTOR_COLUMNS = tl.constexpr(5)  # of FactorTable.rows


@triton.jit
def _fits(a, b):
    """a // b of int64 that are not below zero."""
    return (a.to(tl.uint64) // b.to(tl.uint64)).to(tl.int64)


@triton.jit
def _steps(at, length, CHUNK: tl.constexpr):
    """start and factor, so that (start + e) * factor >> 32 says how often `length` fits in at + e, for at below `length`
    and e below CHUNK. Lengths below CHUNK are divided by with factor = ceil(2^32 / length), which is exact as start + e is
    below 2 CHUNK. Others fit once at most: e is compared with what is left of the first, as a division by CHUNK.
    """
    short = length < CHUNK
    left_over = tl.minimum(length - at, CHUNK)
    start = tl.where(short, at, CHUNK - left_over).to(tl.uint32)
    divisor = tl.where(short, length, CHUNK).to(tl.uint32)
    return start, 0xFFFFFFFF // divisor + 1


@triton.jit
def _times(e, start, factor):
    """How often, for e of any shape."""
    return ((e.to(tl.uint32) + start).to(tl.uint64) * factor >> 32).to(tl.int32)


@triton.jit
def matrix_at(row, values, of_seed, chunk, CHUNK: tl.constexpr):
    """Where a chunk begins in its stack of matrices, and its factors: for `low_rank`. row: of FactorTable.rows; values: the
    address of place 0 of the first seed, which the next seed's is of_seed numbers behind."""
    columns, rows, matrices = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    first = chunk.to(tl.int64) * CHUNK
    top = _fits(first, columns)  # among the rows of all matrices
    column = first - top * columns
    matrix = _fits(top, rows)
    below = tl.minimum(matrices * rows - 1 - top, CHUNK).to(tl.int32)  # rows after it
    values = values.to(tl.int64).to(tl.pointer_type(tl.float32))
    left = values + (tl.load(row + 3) + top)
    right = values + (tl.load(row + 4) + matrix * columns + column)
    of_column, of_row = _steps(column, columns, CHUNK), _steps(top - matrix * rows, rows, CHUNK)
    strides = (matrices * rows, matrices * columns, of_seed.to(tl.int64))  # from k to k + 1 twice, from seed to seed
    return left, right, columns, column, below, of_column, of_row, strides


@triton.jit
def rows_hold_blocks(matrix):
    """Whether the eight elements of a block lie in one row of a matrix, always."""
    return matrix[2] % 8 == 0


@triton.jit
def between_seeds(matrix):
    """How many numbers a seed has. Loops over seeds count in them: see `_row`."""
    return matrix[7][2]


@triton.jit
def _eight(at, begin, end, WHOLE: tl.constexpr):
    """V of each block, [BLOCK, 8], of eight neighbouring numbers. WHOLE: all of them, at a multiple of 32 bytes, in two
    accesses of 16 bytes. Else those from begin to before end; each by itself, so that Triton keeps a block to a thread."""
    if WHOLE:
        four = tl.max_contiguous(tl.multiple_of(at[:, None] + tl.arange(0, 4)[None, :], (4, 16)), (1, 4))
        low, high = tl.load(four), tl.load(four + 4)
        v = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), [at.shape[0], 8])
    else:
        even = tl.join(
            tl.join(_one(at, 0, begin, end), _one(at, 4, begin, end)),
            tl.join(_one(at, 2, begin, end), _one(at, 6, begin, end)),
        )
        odd = tl.join(
            tl.join(_one(at, 1, begin, end), _one(at, 5, begin, end)),
            tl.join(_one(at, 3, begin, end), _one(at, 7, begin, end)),
        )
        v = tl.reshape(tl.join(even, odd), [at.shape[0], 8])
    return v


@triton.jit
def _one(at, j: tl.constexpr, begin, end):
    return tl.load(at + j, mask=(begin <= j) & (j < end), other=0.0)


@triton.jit
def _row(matrix, rank, e, down, to_seed, begin, end, WHOLE: tl.constexpr, CUT: tl.constexpr, PACKED: tl.constexpr):
    """z of a seed, [BLOCK, 8]: of the elements of each block (its first index in the chunk: e) that lie in the row `down`
    below the chunk's first, from begin to before end. Rows behind the last are taken for the last."""
    left, right, columns, _, below, _, of_row, strides = matrix
    between_left, between_right, _ = strides
    row = tl.minimum(down, below) if CUT else down
    further = _times(row, of_row[0], of_row[1]) - down  # matrices, less rows
    left += to_seed + row
    right += to_seed + e + further.to(tl.int64) * columns
    z = mul(_eight(right, begin, end, WHOLE), tl.load(left)[:, None], PACKED)
    if rank is not None:
        # In such steps, because LLVM would unroll a loop whose length it can tell, and take hundreds of registers.
        for to_left in range(between_left, rank * between_left, between_left):
            right += between_right
            z = fma(_eight(right, begin, end, WHOLE), tl.load(left + to_left)[:, None], z, PACKED)
    return z


@triton.jit
def low_rank(matrix, rank, start, lanes, to_seed, CUT: tl.constexpr, PACKED: tl.constexpr):
    """z of a seed on a tile, [BLOCK, 8] float32. rank: None for 1, and no part of `matrix`, since no function of Triton 3.6
    or older returns None in a tuple. start: the tile's first index in the chunk; to_seed: numbers from the first seed's
    factors to its own. Whole tiles are of rows that hold blocks only; else a block is made row by row, of
    which it is in two, or in up to five where these are short."""
    columns, column, of_column = matrix[2], matrix[3], matrix[5]
    e = start + lanes * 8
    down = _times(e, of_column[0], of_column[1])
    if not CUT or rows_hold_blocks(matrix):
        z = _row(matrix, rank, e, down, to_seed, 0, 8, True, CUT, PACKED)
    else:
        step = tl.minimum(columns, 8).to(tl.int32)
        begin = tl.minimum((down + 1).to(tl.int64) * columns - column - e, 8).to(tl.int32) - step  # of its first row
        j = tl.arange(0, 8)[None, :]
        z = tl.zeros([lanes.shape[0], 8], tl.float32)
        for above in range(0, 7 + step, step):
            first, last = begin + above, begin + above + step
            some = _row(matrix, rank, e, down, to_seed, first, last, False, CUT, PACKED)
            z = tl.where((j >= first[:, None]) & (j < last[:, None]), some, z)
            down += 1
    return z


@triton.jit
def _factor(x):
    """The nearest number that float32, bfloat16 and float16 all hold: a multiple of 2^-24 of 8 significant bits. Below
    2^-17 all such multiples have fewer bits; from there on numbers of 8 bits are such multiples."""
    x = tl.where(tl.abs(x) < 2.0**-17, (x + 0.75) - 0.75, x)
    bits = x.to(tl.uint32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)  # no NaN among them
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["values", "of_seed", "first_chunk", "num_chunks"])
def fill_kernel(
    sides, chunks, seeds, values, of_seed, first_chunk, num_chunks, scale, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """The factors of all seeds, a program for each chunk of a side and each seed. sides, chunks: FactorTable's, all of
    them; values: the address of place 0 of the first seed; scale: of U."""
    seed = (tl.program_id(0).to(tl.uint32) // num_chunks.to(tl.uint32)).to(tl.int32)
    chunk = chunks + 2 * (first_chunk + tl.program_id(0) - seed * num_chunks).to(tl.int64)
    row, number = sides + 4 * tl.load(chunk), tl.load(chunk + 1)
    tensor_id, is_right = tl.load((row + 1).to(tl.pointer_type(tl.uint32))), tl.load(row + 2) != 0
    purpose = tl.where(is_right, PURPOSE_RIGHT, PURPOSE_LEFT).to(tl.uint32)
    by = tl.where(is_right, 1.0, scale)
    key = (seeds + seed).to(tl.pointer_type(tl.uint32))
    k0, k1 = tl.load(key), tl.load(key + 1)
    origin = number.to(tl.int64) * CHUNK
    end = tl.minimum(tl.load(row) - origin, CHUNK).to(tl.int32)
    out = values.to(tl.int64).to(tl.pointer_type(tl.float32)) + (
        seed * of_seed.to(tl.int64) + tl.load(row + 3) + origin
    )
    first, high = number.to(tl.uint32) * (CHUNK // 8), number.to(tl.uint32) // (2**32 // (CHUNK // 8))
    lanes = tl.arange(0, BLOCK)
    for tile in range(tl.cdiv(end, BLOCK * 8)):
        z = normals(first + tile * BLOCK, high, lanes, tensor_id, k0, k1, False, purpose)
        at = tile * (BLOCK * 8) + lanes[:, None] * 8 + tl.arange(0, 8)[None, :]
        tl.store(out + at, _factor(z * by), mask=at < end)
