"""A list of tensor shapes like those of an OPT model, of any total size: what a pass over a model meets.

A block has 16 tensors, four of them d x d, two d x 4d, the rest vectors: 12 d^2 + 13 d elements. Blocks hold about four
fifths of the elements, the embedding and one odd-sized vector the rest.
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
