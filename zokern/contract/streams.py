"""All of zk1's streams: what each seed and each purpose of Philox' counter stands for. Numbers here never change.

A run's seed gives one 63-bit seed for each step and stream; a seed gives words for each purpose. Source of SplitMix64:
Steele et al. 2014.

    stream of a step                    its seed is for
    0 <= k < 2^32                       direction k
    ROUNDING_STREAM  2^32               stochastic rounding of the weights
    LAYERS_STREAM    2^32 + 1           LeZO's draw of blocks
    STATE_STREAM     2^32 + 2           stochastic rounding of a state

    purpose (counter word c3)           the words are
    PURPOSE_NORMAL      0               normals, two a word
    PURPOSE_ROUNDING    1               bits that round, two elements a word
    PURPOSE_RADEMACHER  2               signs, 32 elements a word
    PURPOSE_LEFT        3               normals of a low-rank direction's left factor, U
    PURPOSE_RIGHT       4               and of its right factor, V
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from torch import Tensor

ROUNDING_STREAM = 1 << 32
LAYERS_STREAM = ROUNDING_STREAM + 1
STATE_STREAM = ROUNDING_STREAM + 2
PURPOSE_NORMAL, PURPOSE_ROUNDING, PURPOSE_RADEMACHER, PURPOSE_LEFT, PURPOSE_RIGHT = 0, 1, 2, 3, 4

DISTRIBUTIONS = ("normal", "rademacher")  # of a direction's elements; or "lowrank:4", of rank 4
MAX_RANK = 1 << 16
_LOW_RANK = re.compile(r"lowrank:([1-9][0-9]{0,5})")
ROUNDINGS = ("nearest", "stochastic")  # to 16 bits

GOLDEN, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # of the scrambling: a shift and a factor each
LAST_SHIFT = 31


def rank_of(distribution: object) -> int:
    """The rank that the name of a distribution says; 0 for those of independent elements.

    Raises:
        ValueError: for a name that there is not.
    """
    if isinstance(distribution, str):
        if distribution in DISTRIBUTIONS:
            return 0
        named = _LOW_RANK.fullmatch(distribution)
        if named is not None and int(named[1]) <= MAX_RANK:
            return int(named[1])
    names = ", ".join(map(repr, DISTRIBUTIONS))
    raise ValueError(
        f"distribution is {distribution!r}; it must be one of {names}, or 'lowrank:R', 1 <= R <= {MAX_RANK}"
    )


def matrices(shape: Sequence[int], rank: int) -> tuple[int, int, int] | None:
    """A tensor as a stack of matrices, (how many, rows, columns), where its direction is of low rank: 2-D, or 3-D with a
    matrix for each entry of the first dimension, as fused experts have them, if both sides are above the rank. None where
    its noise is dense: anything else, and everything for rank 0.
    """
    if rank == 0 or len(shape) not in (2, 3) or min(shape[-2:]) <= rank:
        return None
    return (1 if len(shape) == 2 else shape[0]), shape[-2], shape[-1]


def splitmix64(state: int, n: int) -> int:
    """The n-th output (n >= 1) of a SplitMix64 generator started at `state`, a 64-bit unsigned integer."""
    x = (state + n * GOLDEN) & MASK
    for shift, factor in ROUNDS:
        x = ((x ^ (x >> shift)) * factor) & MASK
    return x ^ (x >> LAST_SHIFT)


@functools.lru_cache(maxsize=64)
def _of_run(run_seed: int) -> int:
    return splitmix64(run_seed, 1)


def derive_step(run_seed: int, step: int) -> int:
    """What all seeds of a step come from."""
    return splitmix64(_of_run(run_seed), step + 1)


def derive_stream(at_step: int, stream: int) -> int:
    """The seed of a stream, from what `derive_step` gave."""
    return splitmix64(at_step, stream + 1) >> 1


def derive_seed(run_seed: int, step: int, stream: int) -> int:
    """63-bit seed of `stream` in `step` of a run: three chained SplitMix64 outputs, the top 63 bits of the last."""
    return derive_stream(derive_step(run_seed, step), stream)


def _signed(x: int) -> int:
    """The 64 bits of x as torch's int64 has them."""
    return (x & MASK) - ((x >> 63 & 1) << 64)


def _scrambled(state: Tensor) -> Tensor:
    """The scrambling of SplitMix64 on the bits of int64; products wrap."""
    for shift, factor in ROUNDS:
        state = (state ^ (state >> shift & ((1 << 64 - shift) - 1))) * _signed(factor)
    return state ^ (state >> LAST_SHIFT & ((1 << 64 - LAST_SHIFT) - 1))


def derive_seeds(run_seed: int, step: Tensor, streams: Tensor) -> Tensor:
    """derive_seed(run_seed, step, stream) for int64 tensors that broadcast, where they are: no host takes part."""
    at_step = _scrambled(step * _signed(GOLDEN) + _signed(splitmix64(run_seed, 1) + GOLDEN))
    return _scrambled(at_step + (streams + 1) * _signed(GOLDEN)) >> 1 & ((1 << 63) - 1)
