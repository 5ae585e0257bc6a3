"""Rows of tokens laid end to end: without padding, without tokens that nothing reads, and with a prompt that several rows
begin with only once.

A packed forward has one row of N tokens. Only attention sees the rows: it gathers each one's tokens, padded, from the N
(packed_attention.py). All else in such a model works on every token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zokern.finetune.batches import Batch, Packed, Piece, Rows, from_parts, in_parts
from zokern.passes.table import upload

TOKENS = 1024  # of a forward, but for a text that has more: matrix products are no faster with more
_PADDED = 8192  # tokens that attention gathers at once, padding included


@dataclass
class Wanted:
    """The rows of one text. indices: in the set. shared: the first tokens that they have in common, and that are read once.
    counts: of the tokens at each row's end, how many are scored; 0: what would follow the row."""

    indices: list[int]
    shared: int
    counts: list[int]


def pack(rows: Rows, texts: Sequence[Wanted], targets: Sequence[int]) -> Batch:
    """The batch of some texts' rows. Its groups are Packed; their results are one for each row, text by text."""
    sizes = [sum(fed - begin for fed, begin in _fed(rows, text)) for text in texts]
    parts = in_parts(sizes, [rows.lengths[text.indices[0]] for text in texts], TOKENS)
    order, device = from_parts(parts, [len(text.indices) for text in texts]), rows.ids.device
    back, classes = (upload(torch.tensor(list(one)), device) for one in (order, targets))
    return Batch([_packed(rows, [texts[i] for i in part]) for part in parts], back, classes)


def _fed(rows: Rows, text: Wanted) -> list[tuple[int, int]]:
    """Of each row, how many tokens the model is fed, and with which of them the row's own begin. What is scored last is not
    fed."""
    begins = [0, *[text.shared] * (len(text.indices) - 1)]
    counted = zip(text.indices, text.counts, begins, strict=True)
    return [(rows.lengths[i] - (count > 0), begin) for i, count, begin in counted]


def _packed(rows: Rows, texts: Sequence[Wanted]) -> Packed:
    indices = torch.tensor([i for text in texts for i in text.indices])
    counts = torch.tensor([n for text in texts for n in text.counts])
    fed, begins = torch.tensor([pair for text in texts for pair in _fed(rows, text)]).unbind(1)
    starts = (fed - begins).cumsum(0) - (fed - begins)  # of the tokens that are a row's own
    several = torch.tensor([len(text.indices) for text in texts])
    first = (several.cumsum(0) - several).repeat_interleave(several)  # row of the same text
    column = torch.arange(int(fed.max()))
    shared = column < begins[:, None]
    places = torch.where(shared, starts[first, None], (starts - begins)[:, None]) + column
    inside = column < fed[:, None]
    pieces, owners = _pieces(places, inside, inside & ~shared, fed)
    row, position = (inside & ~shared).nonzero(as_tuple=True)
    many = counts.clamp(min=1)
    step = torch.arange(int(many.max()))
    at = (fed - many)[:, None] + step  # the columns that are read
    within = step < many[:, None]
    reads, ends = places.gather(1, torch.where(within, at, (fed - 1)[:, None])).unique(return_inverse=True)
    following = torch.where(within & (counts > 0)[:, None], at + 1, 0)

    def sent(t: Tensor) -> Tensor:
        return upload(t, rows.ids.device)

    def tokens(of: Tensor, at: Tensor) -> Tensor:
        return rows.ids.flatten()[sent(of * rows.ids.shape[1] + at)]

    return Packed(
        tokens(indices[row], position)[None], sent(position[None]), [Piece(*map(sent, piece)) for piece in pieces],
        sent(owners), sent(reads), sent(ends), tokens(indices[:, None], following), sent(many),
    )  # fmt: skip


def _pieces(places: Tensor, inside: Tensor, own: Tensor, fed: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """(places, inside) of each piece, and the places of the tokens in all of them. own: (rows, longest), which are no
    other row's."""
    pieces, owners, before = [], [], 0
    each = max(_PADDED // places.shape[1], 1)
    for start in range(0, len(fed), each):
        part = slice(start, start + each)
        longest = int(fed[part].max())
        kept = inside[part, :longest]
        pieces.append((torch.where(kept, places[part, :longest], 0), kept))
        owners.append(before + own[part, :longest].flatten().nonzero().squeeze(1))
        before += kept.numel()
    return pieces, torch.cat(owners)
