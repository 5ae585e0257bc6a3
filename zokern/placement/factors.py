"""The factors of a probe's directions, in buffers that stay where they are: what is read there is written in place."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zokern import backends
from zokern.backends import reference as reference_backend
from zokern.contract import reference
from zokern.contract.streams import matrices
from zokern.passes import operators
from zokern.passes.factors import SLACK, FactorTable, Ints, Piece, build, padded
from zokern.passes.table import CHUNK, upload
from zokern.passes.update import sent
from zokern.placement.sites import Pools, fit
from zokern.sweep import Member, num_modes

Views = tuple[Tensor, Tensor, Tensor]  # of a member: left [K r, m], right [K r, n] or with E in the middle, scale [K r]


@dataclass
class _Made:
    """For one number of seeds and rows. buffer: float32 [K, numbers of a seed], as backends fill it; others: the same in 16
    bits; scales: float32 [rows, K, r]. merged: pairs of what is filled and what is looked at, where that lies otherwise."""

    buffer: Tensor
    others: list[Tensor]
    scales: Tensor
    views: list[Views]
    merged: list[tuple[Tensor, Tensor]]


def _fill(buffer: Tensor, sides: Tensor, side_chunks: Tensor, seeds: Tensor, rank: int, backend: str) -> None:
    """The factors of the seeds to the buffer [K, numbers of a seed], by the module that is a backend."""
    table = FactorTable(rank, sides, sides, side_chunks, ())  # whose rows nothing reads
    piece = Piece((0, 0), (0, len(side_chunks)), (0, buffer.shape[1]))
    sys.modules[backend].fill(table, piece, seeds, buffer.data_ptr())


_filled_through_torch = operators.register_fill(_fill)


def by_device(members: Sequence[Member]) -> dict[torch.device, list[int]]:
    """Which of them are where."""
    found: dict[torch.device, list[int]] = {}
    for i, m in enumerate(members):
        found.setdefault(m.param.device, []).append(i)
    return found


class Factors:
    """Of the members of one device: buffers that serve every number of seeds which needs no more than there is.

    at: which of the stand-ins they are of. pools: what is kept, in float32 and in the dtypes of 16-bit members.
    """

    def __init__(self, members: Sequence[Member], at: Sequence[int], rank: int, backend: str, pools: Pools) -> None:
        self.members, self.at, self.rank, self.pools = members, at, rank, pools
        self.device = members[0].param.device
        self.backend = backends.choose(backend, self.device)
        self.stacks = [stack for m in members if (stack := matrices(m.param.shape, rank)) is not None]
        rows: Ints = np.arange(len(members))
        self.table = build(
            self.stacks, [m.tensor_id for m in members], rank, rows, np.zeros_like(rows), CHUNK,
            lambda t: upload(t, self.device),
        )  # fmt: skip
        every = [one.places for one in self.table.tensors]
        self.of_seed = every[-1][1]
        self.places = [begin for begin, _ in every]
        self.made: dict[tuple[int, int], _Made] = {}
        self.now: _Made | None = None

    @staticmethod
    def nbytes(members: Sequence[Member], rank: int, seeds: int = 1) -> int:
        """Of the pools, for so many seeds and as many rows as there are, and of what is merged."""
        stacks = [stack for m in members if (stack := matrices(m.param.shape, rank)) is not None]
        of_seed = sum(padded(rank * e * side) for e, m, n in stacks for side in (m, n))
        size = padded(rank * seeds * (1 + max(m.row for m in members))) + seeds * of_seed + SLACK
        merged = 0
        if seeds > 1 and rank > 1:
            each = zip(members, stacks, strict=True)
            merged = sum(seeds * rank * e * (m + n) * member.param.dtype.itemsize for member, (e, m, n) in each)
        return merged + size * sum(dtype.itemsize for dtype in {m.param.dtype for m in members} | {torch.float32})

    def of(self, rows: int, count: int) -> list[Views]:
        """What each member looks at, for this many rows of coefficients and seeds: the same list for the same views."""
        one = self.made.get((rows, count))
        if one is None:
            one = self.made[rows, count] = self._make(rows, count)
        self.now = one
        return one.views

    def _make(self, rows: int, count: int) -> _Made:
        scales = rows * count * self.rank
        size = padded(scales) + count * self.of_seed + SLACK
        apart = count > 1 and self.rank > 1
        dtypes = {m.param.dtype for m in self.members} | {torch.float32}
        before = {key: id(pool) for key, pool in self.pools.items()}
        fit(self.pools, {(self.device, dtype): size for dtype in dtypes})
        if before != {key: id(pool) for key, pool in self.pools.items()}:
            self.made.clear()
        own = self.pools[self.device, torch.float32]
        one = _Made(self._part(own, padded(scales), count), [], own[:scales].view(rows, count, self.rank), [], [])
        looked_at = {}
        for (_, dtype), pool in self.pools.items():
            looked_at[dtype] = part = self._part(pool, padded(scales), count)
            one.others += [part] if dtype != torch.float32 else []
        for i, member in enumerate(self.members):
            pair = [self._view(looked_at[member.param.dtype], i, right) for right in (False, True)]
            if apart:
                pair = [self._merged(one, view) for view in pair]
            one.views.append((pair[0], pair[1], one.scales[member.row].view(-1)))
        return one

    def _part(self, pool: Tensor, start: int, count: int) -> Tensor:
        return pool[start : start + count * self.of_seed].view(count, self.of_seed)

    def _view(self, part: Tensor, i: int, right: bool) -> Tensor:
        """[K r, m], or [K, r, m] where that cannot be; with E before m where there are several matrices."""
        e, m, n = self.stacks[i]
        place = self.places[i] + right * padded(self.rank * e * m)
        side = n if right else m
        flat = part[:, place : place + self.rank * e * side]
        shape = (e, side) if self.members[i].param.dim() == 3 else (side,)
        if self.rank == 1:
            return flat.view(-1, *shape)
        return flat.view(-1, self.rank, *shape) if len(part) > 1 else flat.view(self.rank, *shape)

    def _merged(self, one: _Made, view: Tensor) -> Tensor:
        there = torch.empty(view.shape, dtype=view.dtype, device=view.device)
        one.merged.append((view, there))
        return there.view(-1, *view.shape[2:])

    def fill(self, seeds: Tensor, first: int = 0) -> None:
        """seeds int64 [K], of the directions that the buffers are to hold, from the `first` place on."""
        one = self.now
        assert one is not None
        at = slice(first, first + len(seeds))
        buffer = one.buffer[at]
        if self.backend is reference_backend:
            self._by_contract(buffer, seeds.tolist())
        else:
            near = seeds if len(seeds) == 1 and seeds.is_cpu else sent(seeds, self.device)
            # As a pass does: modes and the profiler see it through PyTorch's dispatcher.
            seen = num_modes() > 0 or torch.autograd.profiler._is_profiler_enabled
            fill = _filled_through_torch if seen else _fill
            fill(buffer, self.table.sides, self.table.side_chunks, near, self.rank, self.backend.__name__)
        for other in one.others:
            other[at].copy_(buffer)  # exact
        for view, there in one.merged:
            there[at].copy_(view[at])

    def _by_contract(self, buffer: Tensor, seeds: Sequence[int]) -> None:
        for row, seed in zip(buffer, seeds, strict=True):
            for place, stack, member in zip(self.places, self.stacks, self.members, strict=True):
                for factor in reference.factors(stack, self.rank, seed, member.tensor_id):
                    row[place : place + factor.size].copy_(torch.from_numpy(factor.ravel()))
                    place += padded(factor.size)

    def memory(self) -> list[Tensor]:
        return [*self.pools.values(), *(there for one in self.made.values() for _, there in one.merged)]

    def rescale(self, coefs: Tensor) -> None:
        """coefs float32 [rows, K], of the first K places."""
        assert self.now is not None
        scales = self.now.scales[:, : coefs.shape[1]]
        scales.copy_(coefs[:, :, None].expand_as(scales), non_blocking=self.device.type != "cpu")
