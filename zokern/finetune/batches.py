"""Tokenised texts as one padded matrix, and batches cut from it with little padding.

A batch is drawn at random; only inside it are the texts sorted by length and cut into groups, so that the draw stays
unbiased and a forward of short sentences does not pay for the longest one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zokern.passes.table import upload

# Rows a group. On a CPU the time is the tokens, padding included; on a GPU it is the launches: one group.
_CPU_GROUP = 16


@dataclass
class Rows:
    """ids[i, :lengths[i]] are the tokens of row i; the rest is padding. types: which text of a pair each token is of, where
    the model is told."""

    ids: Tensor
    lengths: list[int]
    types: Tensor | None = None

    @classmethod
    def pack(
        cls,
        tokens: Sequence[Sequence[int]],
        pad: int,
        device: torch.device,
        types: Sequence[Sequence[int]] | None = None,
    ) -> Rows:
        """Rows of ragged token lists."""
        kinds = None if types is None else _matrix(types, 0).to(device)
        return cls(_matrix(tokens, pad).to(device), [len(row) for row in tokens], kinds)


def _matrix(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    made = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.long)
    for i, row in enumerate(rows):
        made[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return made


@dataclass
class Group:
    """A part of a batch: ids, mask and types are (rows, tokens), lengths and rows (their indices) are (rows,).

    shortest: the smallest length, known without asking the device. types: as Rows has them.
    """

    ids: Tensor
    mask: Tensor
    lengths: Tensor
    rows: Tensor
    shortest: int
    types: Tensor | None = None


@dataclass
class Piece:
    """Rows whose attention is done at once. places: (rows, longest), of each token among the N; 0 where there is none.
    inside: (rows, longest), whether there is one."""

    places: Tensor
    inside: Tensor


@dataclass
class Packed:
    """A part of a batch whose rows lie end to end (packing.py).

    ids, positions: (1, N). owners: (N,), the place of each token in the pieces, flattened one after another.
    reads: (k,), the tokens whose outputs are read. ends: (rows, most), where in `reads` each row has its own. said:
    (rows, most), the token that is to follow there. counts: (rows,), how many of them each row has; the rest is padding.
    """

    ids: Tensor
    positions: Tensor
    pieces: list[Piece]
    owners: Tensor
    reads: Tensor
    ends: Tensor
    said: Tensor
    counts: Tensor


@dataclass
class Batch:
    """The groups of a batch, the permutation that puts their rows back in the order asked for, and the targets."""

    groups: Sequence[Group | Packed]
    order: Tensor
    targets: Tensor

    def gather(self, parts: list[Tensor]) -> Tensor:
        """One result per group -> one per row, in the order asked for."""
        return torch.cat(parts).index_select(0, self.order)


def cut(rows: Rows, wanted: Sequence[int], targets: Sequence[int], *, whole: bool = False) -> Batch:
    """The batch of the rows with the indices `wanted`. targets: class indices, carried along. whole: in one group."""
    device = rows.ids.device
    by_length = sorted(range(len(wanted)), key=lambda i: rows.lengths[wanted[i]])
    chosen = [wanted[i] for i in by_length]
    order = [0] * len(wanted)
    for place, i in enumerate(by_length):
        order[i] = place
    lengths = [rows.lengths[i] for i in chosen]
    # In one transfer, for which nothing waits.
    numbers = upload(torch.tensor([*chosen, *lengths, *order, *targets], dtype=torch.long), device)
    all_rows, all_lengths, back, classes = numbers.split([len(wanted)] * 3 + [len(targets)])
    size = _CPU_GROUP if device.type == "cpu" and not whole else len(wanted)
    groups: list[Group] = []
    for start in range(0, len(wanted), size):
        part = slice(start, start + size)
        shortest, longest = lengths[start], lengths[part][-1]  # sorted
        ids = rows.ids.index_select(0, all_rows[part])[:, :longest].contiguous()
        types = None if rows.types is None else rows.types.index_select(0, all_rows[part])[:, :longest].contiguous()
        mask = (torch.arange(longest, device=device) < all_lengths[part, None]).long()
        groups.append(Group(ids, mask, all_lengths[part], all_rows[part], shortest, types))
    return Batch(groups, back, classes)


def in_parts(sizes: Sequence[int], lengths: Sequence[int], most: int) -> list[list[int]]:
    """Which texts go together: neighbours by length, of at most `most` in all, or one. sizes: what each takes."""
    parts: list[list[int]] = []
    room = 0
    for i in sorted(range(len(sizes)), key=lengths.__getitem__):
        if sizes[i] > room:
            parts.append([])
            room = most
        parts[-1].append(i)
        room -= sizes[i]
    return parts


def from_parts(parts: Sequence[Sequence[int]], counts: Sequence[int]) -> list[int]:
    """The permutation that puts rows back which come text by text, in the order of the parts. counts: rows of each text."""
    starts, at = [0] * len(counts), 0
    for i in itertools.chain.from_iterable(parts):
        starts[i], at = at, at + counts[i]
    return [start + row for start, count in zip(starts, counts, strict=True) for row in range(count)]


class Order:
    """Endless random order of `count` examples, each once an epoch, from its own generator, never the global one."""

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting: list[int] = []

    def draw(self, size: int) -> list[int]:
        """The next `size` indices."""
        while len(self._waiting) < size:
            self._waiting += torch.randperm(self._count, generator=self._generator).tolist()
        drawn, self._waiting = self._waiting[:size], self._waiting[size:]
        return drawn
