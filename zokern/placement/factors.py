"""The factors of a probe's directions, in buffers that stay where they are: what is read there is written in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zokern.contract import reference
from zokern.contract.streams import matrices
from zokern.placement.sites import Pools, fit
from zokern.sweep import Member

Views = tuple[Tensor, Tensor, Tensor]


@dataclass
class _Made:
    """Views of the pools. buffers: left and right, float32 [K r, E m] and [K r, E n]; views: as the weight's products take
    them; scales: float32 [rows, K, r]."""

    buffers: list[tuple[Tensor, Tensor]]
    views: list[Views]
    scales: Tensor


def fill(members: Sequence[Member], rank: int, seeds: Tensor, buffers: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Writes the factors of K seeds, int64 [K], to each member's left [K r, E m] and right [K r, E n], float32."""
    for member, (left, right) in zip(members, buffers, strict=True):
        stack = matrices(member.param.shape, rank)
        assert stack is not None
        for k, seed in enumerate(seeds.tolist()):
            made = reference.factors(stack, rank, seed, member.tensor_id)
            for to, factor in zip((left, right), made, strict=True):
                to[k * rank : (k + 1) * rank].copy_(torch.from_numpy(np.ascontiguousarray(factor)))


def _padded(size: int) -> int:
    """To the next 16-byte boundary of 16-bit types."""
    return -(-size // 8) * 8


class Factors:
    """Of the members of one device: buffers that serve every number of seeds which needs no more than there is.

    at: which of the stand-ins they are of. pools: what is kept, in float32 and in the dtypes of 16-bit members.
    """

    def __init__(self, members: Sequence[Member], at: Sequence[int], rank: int, pools: Pools) -> None:
        self.members, self.at, self.rank, self.pools = members, at, rank, pools
        self.device = members[0].param.device
        self.stacks = [stack for m in members if (stack := matrices(m.param.shape, rank)) is not None]
        self.made: dict[tuple[int, int], _Made] = {}
        self.now: _Made | None = None

    def of(self, rows: int, count: int) -> list[Views] | None:
        """Each member's left, right and scale for this many rows of coefficients and seeds; None: those of the last time."""
        one = self.made.get((rows, count))
        if one is None:
            many = count * self.rank
            sides = [_padded(many * e * side) for e, m, n in self.stacks for side in (m, n)]
            self._fit(_padded(many * rows) + sum(sides))
            one = self.made[rows, count] = self._make(rows, count)
        if one is self.now:
            return None
        self.now = one
        return one.views

    def _fit(self, size: int) -> None:
        dtypes = {m.param.dtype for m in self.members} | {torch.float32}
        before = {key: id(pool) for key, pool in self.pools.items()}
        fit(self.pools, {(self.device, dtype): size for dtype in dtypes})
        if before != {key: id(pool) for key, pool in self.pools.items()}:
            self.made.clear()

    def _make(self, rows: int, count: int) -> _Made:
        pool, many = self.pools[self.device, torch.float32], count * self.rank
        scales = pool[: many * rows].view(rows, count, self.rank)
        start, buffers, views = _padded(scales.numel()), [], []
        for member, (e, m, n) in zip(self.members, self.stacks, strict=True):
            wanted, seen = [], []
            for side in (m, n):
                size = many * e * side
                shape = (many, e, side) if member.param.dim() == 3 else (many, side)
                wanted.append(pool[start : start + size].view(many, e * side))
                seen.append(self.pools[self.device, member.param.dtype][start : start + size].view(shape))
                start += _padded(size)
            buffers.append((wanted[0], wanted[1]))
            views.append((seen[0], seen[1], scales[member.row].view(many)))
        return _Made(buffers, views, scales)

    def fill(self, seeds: Tensor) -> None:
        """seeds int64 [K], of the directions that the buffers are to hold."""
        assert self.now is not None
        fill(self.members, self.rank, seeds, self.now.buffers)
        whole = self.pools[self.device, torch.float32]
        for half in self.pools.values():
            if half is not whole:
                half.copy_(whole)  # exact

    def rescale(self, coefs: Tensor) -> None:
        """coefs float32 [rows, K]."""
        assert self.now is not None
        self.now.scales.copy_(coefs[:, :, None].expand_as(self.now.scales), non_blocking=self.device.type != "cpu")
