"""Many probes of placement="forward" at once: each block of a batch's rows sees the weights of its own probe.

Matrices get stand-ins that add another matrix of low rank in each block (`BlockMatrix`); norms, biases and whatever else
forward copies have a copy for each block (`PerBlock`), written from the weights by a pass for each block, so that each of
its copies has the bits that a probe alone sees.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zokern.passes.update import CPU, Seed, Terms, same_seed, seed_tensor, sent
from zokern.placement import blockwise as _products  # noqa: F401  blocks know them from there
from zokern.placement import elementwise as _numbers  # noqa: F401
from zokern.placement import plus, sites
from zokern.placement.blocks import BlockMatrix, PerBlock
from zokern.placement.factors import Factors, by_device
from zokern.placement.rows import NotInBlocks, Rows
from zokern.sweep import Member, Sweep

if TYPE_CHECKING:
    from zokern.placement.forward import Forward

ALWAYS = 64 << 20  # bytes that copies for all blocks may take; beyond it, as much as the weights


class Together:
    """Of one placement: what is shown for a number of blocks, kept from step to step."""

    def __init__(self, owner: Forward) -> None:
        self._owner = weakref.ref(owner)
        self.factor_pools: dict[torch.device, sites.Pools] = {}
        self.pools: sites.Pools = {}
        self.layout: object = None
        self.lower: list[Member] = []
        self.dense: list[Member] = []
        self.factors: list[Factors] = []
        self.matrices: list[BlockMatrix] = []
        self.small: list[PerBlock] = []
        self.out: list[list[Tensor]] = []  # of each block, a copy of each small member
        self.sweeps: list[Sweep] = []  # one a block: each has its operands
        self.filled: list[Seed] = []

    @property
    def owner(self) -> Forward:
        found = self._owner()
        assert found is not None
        return found

    @contextlib.contextmanager
    def present(self, probes: Sequence[Terms], rows: Rows) -> Iterator[None]:
        """Inside, block k of `rows` sees theta + eps sum_j a_j z(seed_j) with a_j = probes[k][seed_j].

        Raises:
            NotInBlocks: where copies for all blocks would need too much memory.
        """
        owner = self.owner
        if owner.addresses != owner.sweep.addresses:
            owner._follow()
        width = max(1, *map(len, probes))
        self._lay_out(len(probes), width)
        for stand_in in (*self.matrices, *self.small):
            stand_in.rows = rows
        self._aim(probes, width)
        shown: dict[int, nn.Parameter] = {id(m.param): one for m, one in zip(self.lower, self.matrices, strict=True)}
        shown |= {id(m.param): one for m, one in zip(self.dense, self.small, strict=True)}
        before = owner.pairs
        owner.pairs = [(site, shown[id(site.param)]) for site in owner.sites]
        try:
            owner._show(copies=True)
            owner.saving, plus.USED[0] = False, False
            with torch.compiler.set_stance("force_eager"):  # torch's compiler does not look through these stand-ins
                yield
            owner.check_saved()
            plus.USED[0] = plus.USED[0] or bool(rows.used)
            for one in owner.stand_ins:
                one.seen[0] = one.seen[0] or one.parameter in rows.used
            owner._check_used()
        finally:
            owner._show(copies=False)
            owner.pairs = before

    def _lay_out(self, count: int, width: int) -> None:
        owner = self.owner
        written = owner.written_out
        layout = owner.layout, count, width, list(owner.addresses), sorted(written)
        if layout == self.layout:
            return
        self.layout, self.factors, self.matrices, self.small, self.out, self.filled = None, [], [], [], [], []
        self.sweeps = []
        self.lower = [m for m in owner.lower if id(m.param) not in written]
        self.dense = [*owner.dense, *(m for m in owner.lower if id(m.param) in written)]
        self._small(count)
        for m in self.lower:
            one = BlockMatrix(m.param.detach(), Rows(count), m.name, m.param.requires_grad)
            one.leaf = nn.Parameter(m.param.detach(), m.param.requires_grad)
            one.__dict__.update(m.param.__dict__)
            self.matrices.append(one)
        for device, at in by_device(self.lower).items():
            pools = self.factor_pools.setdefault(device, {})
            factors = Factors([self.lower[i] for i in at], at, owner.rank, owner.passes.backend, pools)
            views = factors.of(len(owner.eps), count * width)
            for i, (left, right, scale) in zip(at, views, strict=True):
                one, matrix = self.matrices[i], self.lower[i].param.shape
                one.left = left.view(count, width * owner.rank, *matrix[:-1])
                one.right = right.view(count, width * owner.rank, *matrix[:-2], matrix[-1])
                one.scale = scale.view(count, width * owner.rank)
            self.factors.append(factors)
        self.layout = layout

    def _small(self, count: int) -> None:
        """A copy for each block of all that has no stand-in with factors."""
        dense = self.dense
        wanted = {key: size * count for key, size in sites.sizes(dense).items()}
        copied = sum(m.param.nbytes for m in dense)
        if count * copied > max(ALWAYS, sum(m.param.nbytes for m in self.owner.sweep)):
            raise NotInBlocks(
                f"{len(dense)} tensors that are no matrices of products need {count} copies, "
                f"{count * copied / 2**20:.0f} MiB, more than the weights"
            )
        sites.fit(self.pools, wanted)
        used = dict.fromkeys(wanted, 0)
        self.out = [[] for _ in range(count)]
        for m in dense:
            key = m.param.device, m.param.dtype
            size = sites.padded_size(m.param)
            pool = self.pools[key][used[key] : used[key] + count * size].view(count, size)
            used[key] += count * size
            values = pool[:, : m.param.numel()].view(count, *m.param.shape)
            one = PerBlock(values, Rows(count), m.name, m.param.requires_grad)
            one.__dict__.update(m.param.__dict__)
            self.small.append(one)
            for k in range(count):
                self.out[k].append(values[k])
        self.sweeps = [Sweep(dense) for _ in range(count)]

    def _aim(self, probes: Sequence[Terms], width: int) -> None:
        """Every block's factors and scales, and its copies of what is small."""
        owner, any_seed = self.owner, next(iter(next(filter(None, probes))))
        seeds: list[Seed] = []
        multiples: list[float | Tensor] = []
        for terms in probes:
            missing = width - len(terms)
            seeds += [*terms, *[next(iter(terms), any_seed)] * missing]
            multiples += [*terms.values(), *[0.0] * missing]
        coefs = _along(owner.eps, multiples, captured=isinstance(any_seed, Tensor))
        numbers = seed_tensor(seeds)
        anew = len(seeds) != len(self.filled) or not all(map(same_seed, seeds, self.filled))
        filled, self.filled = self.filled, []
        for factors in self.factors:
            factors.rescale(coefs)
            if anew or not filled:
                factors.fill(numbers)
        self.filled = seeds
        if self.dense:
            torch.clear_autocast_cache()
            for k, (sweep, out) in enumerate(zip(self.sweeps, self.out, strict=True)):
                part = slice(k * width, (k + 1) * width)
                own = coefs[:, None, part].contiguous()
                given = owner.numbers_of_block(numbers[part], own)
                owner.passes.run(sweep, owner.spec, given, out=out, counted=False)

    def memory(self) -> list[Tensor]:
        kept = [*self.pools.values(), *(pool for pools in self.factor_pools.values() for pool in pools.values())]
        return [*kept, *(there for one in self.factors for made in one.made.values() for _, there in made.merged)]


def _along(eps: Tensor, multiples: Sequence[float | Tensor], *, captured: bool) -> Tensor:
    """[R, K]: each row's eps times each multiple, rounded once to float32. captured: numbers of the host are filled in, as
    their copy could not be a part of a graph."""
    tensors = [t for t in multiples if isinstance(t, Tensor)]
    device = next((t.device for t in tensors if t.device != eps.device), eps.device)
    if tensors or captured:
        made = {}
        for t in multiples:
            if not isinstance(t, Tensor) and t not in made:
                there = device if captured else CPU
                made[t] = torch.full((), t, dtype=torch.float64, device=there)
        each = torch.stack([sent(t if isinstance(t, Tensor) else made[t], device) for t in multiples])
    else:
        each = torch.tensor(multiples, dtype=torch.float64, device=CPU)
    return (sent(eps, device).unsqueeze(1) * sent(each, device)).to(torch.float32)
