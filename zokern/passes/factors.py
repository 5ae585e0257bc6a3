"""The factors of a table of matrices whose directions are of low rank: where U and V lie, and what makes them.

Backends fill a buffer with the factors of all seeds and then go over the weights. The buffer holds, for each seed,
`of_seed` float32 numbers: U [rank, E*m] and V [rank, E*n] of each tensor, a stack of E matrices [m, n], each from a
multiple of 8 on. The layouts are csrc/pass.h's FactorRow and FactorSide, and Triton's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SLACK = 64  # float32 after the last factor that vectors may read; csrc/pass.h
MOST_BYTES = 64 << 20  # of factors at once, or those of one tensor: a pass with more goes in several pieces
Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Stack = tuple[int, int, int]  # matrices, rows, columns


class Piece(NamedTuple):
    """Neighbouring tensors of a table: their chunks, the chunks of their sides, and the places of their factors, each
    [begin, end)."""

    chunks: tuple[int, int]
    sides: tuple[int, int]
    places: tuple[int, int]

    @property
    def of_seed(self) -> int:
        return self.places[1] - self.places[0]


@dataclass(frozen=True, eq=False)
class FactorTable:
    """rows int64 [T, 5], beside the table's own: columns, rows, matrices, places of U and V. sides int64 [2 P, 4] of its P
    tensors: numel, tensor id, 0 for U or 1 for V, place. side_chunks int32 [C, 2]: row of sides, number of a chunk."""

    rank: int
    rows: Tensor
    sides: Tensor
    side_chunks: Tensor
    tensors: tuple[Piece, ...]
    _pieces: dict[int, tuple[Piece, ...]] = field(default_factory=dict, repr=False)

    @property
    def scale(self) -> float:
        """What U's normals are multiplied with, in float32."""
        return float(np.float32(1.0 / math.sqrt(self.rank)))

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.sides.nbytes + self.side_chunks.nbytes

    def kept(self) -> tuple[Tensor, ...]:
        return self.rows, self.sides, self.side_chunks

    def pieces(self, num_seeds: int) -> tuple[Piece, ...]:
        """The table in as many pieces as its factors need so that those of all seeds fit."""
        if num_seeds not in self._pieces:
            self._pieces[num_seeds] = self._cut(num_seeds)
        return self._pieces[num_seeds]

    def _cut(self, num_seeds: int) -> tuple[Piece, ...]:
        made: list[Piece] = []
        for one in self.tensors:
            if made:
                last = made[-1]
                both = Piece(*((a[0], b[1]) for a, b in zip(last, one, strict=True)))
                if both.of_seed * 4 * max(num_seeds, 1) <= MOST_BYTES:
                    made[-1] = both
                    continue
            made.append(one)
        return tuple(made)


def padded(numbers: int) -> int:
    return -(-numbers // 8) * 8


def build(
    stacks: Sequence[Stack],
    ids: Sequence[int],
    rank: int,
    tensor_of: Ints,
    chunks_of: Ints,
    chunk: int,
    upload: Callable[[Tensor], Tensor],
) -> FactorTable:
    """tensor_of: the tensor of each of the table's rows. chunks_of: how many chunks each tensor has there. chunk: numbers
    in a side's."""
    rows: Ints = np.zeros((len(stacks), 5), np.int64)
    sides: Ints = np.zeros((2 * len(stacks), 4), np.int64)
    side_chunks: list[tuple[int, int]] = []
    tensors, place, at = [], 0, 0
    for i, ((count, height, width), tensor_id, own) in enumerate(zip(stacks, ids, chunks_of.tolist(), strict=True)):
        begin, first = place, len(side_chunks)
        numels = rank * count * height, rank * count * width
        rows[i] = width, height, count, begin, begin + padded(numels[0])
        for right, numel in enumerate(numels):
            sides[2 * i + right] = numel, tensor_id, right, place
            side_chunks += [(2 * i + right, number) for number in range(-(-numel // chunk))]
            place += padded(numel)
        tensors.append(Piece((at, at + own), (first, len(side_chunks)), (begin, place)))
        at += own
    chunks = np.array(side_chunks, np.int32).reshape(-1, 2)
    sent = (
        upload(torch.from_numpy(rows[tensor_of])),
        upload(torch.from_numpy(sides)),
        upload(torch.from_numpy(chunks)),
    )
    return FactorTable(rank, *sent, tensors=tuple(tensors))
