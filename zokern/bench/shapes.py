"""Tensor shapes like those of transformers, of any total size: what a pass over a model meets.

opt_like: of the kernel benchmarks. A block has 16 tensors, four of them d x d, two d x 4d, the rest vectors: 12 d^2 + 13 d
elements. Blocks hold about four fifths of the elements, the embedding and one odd-sized vector the rest.
square: of `scaling`. A block has four d x d matrices, two of d x 4d and four vectors; the embedding holds a tenth.
"""

from __future__ import annotations

from dataclasses import dataclass

WIDTHS = (8, 16, 32, 64, 128, 256, 512, 768, 1024, 2048, 4096, 5120)  # from 512: those of OPT
MIN_ELEMENTS = 1 << 13  # four blocks of the narrowest width, and an embedding
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shapes:
    """blocks: the shapes of each transformer block; rest: of the tensors outside all blocks."""

    blocks: list[list[Shape]]
    rest: list[Shape]


def block_shapes(d: int) -> list[Shape]:
    """One block: q, k, v and output projections, two layer norms, the two layers of the MLP."""
    attention: list[Shape] = [(d, d), (d,)] * 4
    norms: list[Shape] = [(d,), (d,)] * 2
    return [*attention, *norms, (4 * d, d), (4 * d,), (d, 4 * d), (d,)]


def opt_like(elements: int) -> Shapes:
    """Shapes whose sizes sum to `elements`: the widest model that has at least 8 blocks, a multiple of 4 of them.

    Raises:
        ValueError: below MIN_ELEMENTS.
    """
    if elements < MIN_ELEMENTS:
        raise ValueError(f"elements is {elements}; a model of the narrowest width needs at least {MIN_ELEMENTS}")
    fits = [d for d in WIDTHS if 8 * (12 * d * d + 13 * d) <= 0.8 * elements]
    d = fits[-1] if fits else WIDTHS[0]
    size = 12 * d * d + 13 * d
    count = max(int(0.8 * elements / size) // 4 * 4, 4)
    rows, tail = divmod(elements - count * size, d)
    rest: list[Shape] = [(rows, d)]
    return Shapes([block_shapes(d)] * count, rest + ([(tail,)] if tail else []))


def square(parameters: int) -> Shapes:
    """About `parameters`, to a few per cent from ten million on; the width is about 64 times the number of blocks."""
    d = max(8, round((0.9 * parameters * 64 / 12) ** (1 / 3) / 8) * 8)
    count = max(2, round(0.9 * parameters / (12 * d**2)))
    block: list[Shape] = [*[(d, d)] * 4, (4 * d, d), (d, 4 * d), *[(d,)] * 4]
    return Shapes([block] * count, [(max(1, round(0.1 * parameters / d)), d)])
