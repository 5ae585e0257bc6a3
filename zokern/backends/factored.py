"""Passes over matrices whose directions are of low rank: in pieces, each with its factors made in memory just before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from zokern.backends import native
from zokern.passes.factors import SLACK, FactorTable, Piece
from zokern.passes.table import Table

WHOLE: tuple[tuple[None, native.Factors], ...] = ((None, native.NO_FACTORS),)  # a table that has none: one piece
# Writes the factors of these seeds of a piece to the address.
Fill = Callable[[FactorTable, Piece, Tensor, int], None]


def pieces(
    table: Table, factors: FactorTable, seeds: Sequence[Tensor], fill: Fill
) -> Iterator[tuple[native.Place, native.Factors]]:
    """Each piece's place in the table, and its factors as a pass takes them: of all seeds, one after another.

    They are of use until the next piece is asked for; a device does what it is given in turn, so nothing waits.
    """
    count = sum(map(Tensor.numel, seeds))
    rows, chunks, _ = table.place
    cut = factors.pieces(count)
    # One buffer for all pieces: none can fail for want of memory when others are done.
    most = count * max((piece.of_seed for piece in cut), default=0)
    values = torch.empty(most + SLACK, dtype=torch.float32, device=table.tensors.device)
    for piece in cut:
        address = values.data_ptr()
        for some in seeds:
            if some.numel():
                fill(factors, piece, some, address)
                address += 4 * piece.of_seed * some.numel()
        begin, end = piece.chunks
        # Places are counted from the table's first tensor, the buffer begins with the piece's.
        first = values.data_ptr() - 4 * piece.places[0]
        yield (rows, chunks + 8 * begin, end - begin), (factors.rows.data_ptr(), first, piece.of_seed, factors.rank)


def make_fill(factors: FactorTable, piece: Piece, seeds: Tensor, address: int) -> object:
    """What fills a piece, as csrc/pass.h has it; seeds on the host only where there is one, or on the CPU."""
    begin, end = piece.sides
    return native.extension.FactorFill(
        sides=(factors.sides.data_ptr(), factors.side_chunks.data_ptr() + 8 * begin, end - begin),
        seeds=seeds.data_ptr(),
        num_seeds=seeds.numel(),
        seeds_on_host=seeds.is_cpu,
        values=address - 4 * piece.places[0],
        of_seed=piece.of_seed,
        rank=factors.rank,
    )
