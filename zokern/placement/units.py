"""A module's blocks as placement="stream" works on them, the scratches that they take in turn, and how large these are."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zokern import parts
from zokern.layers import find_blocks
from zokern.placement import sites
from zokern.placement.base import NotSeen, RefusedCall
from zokern.placement.beside import Done
from zokern.placement.outside import OutsideItsBlock, stand_in
from zokern.sweep import NOTHING, Member, Sweep


def freezing() -> bool:
    """Whether torch's compiler, if it has been used, makes constants of weights."""
    inductor = sys.modules.get("torch._inductor.config")
    return inductor is not None and bool(inductor.freezing)


@dataclass(eq=False)
class Scratch:
    """Memory that blocks take in turn. last: the block whose weights it holds, or is about to. users: of each pool, how
    many tensors look at it. ahead: it was filled for a block that is yet to be called; done: what that one waits for."""

    pools: sites.Pools = field(default_factory=dict)
    last: Unit | None = None
    users: list[int] = field(default_factory=list)
    ahead: bool = False
    done: Done = field(default_factory=list)

    def count(self) -> None:
        """Just after a fill: a pass' own views are among the users, which are kept for the next."""
        self.users = self._users()

    def _users(self) -> list[int]:
        return [torch._C._storage_Use_Count(pool.untyped_storage()._cdata) for pool in self.pools.values()]

    def refuse_views(self) -> None:
        """What the last block returned or stored may be a view of its weights, which are about to be overwritten."""
        now = self._users()
        if self.last is not None and any(n > own for n, own in zip(now, self.users, strict=True)):
            gc.collect()  # it may be one that nobody can reach
            now = self._users()
            if any(n > own for n, own in zip(now, self.users, strict=True)):
                frozen = freezing()
                refused = NotSeen if frozen else RefusedCall
                raise refused(
                    f"a view of the perturbed weights of {self.last.name} is still held after its forward, and "
                    "placement='stream' overwrites them now; "
                    + (
                        "torch._inductor.config.freezing makes constants of weights, which no placement can reach: "
                        "switch it off"
                        if frozen
                        else "use placement='shadow' for this model, or clone it"
                    )
                )


@dataclass(eq=False)
class Unit:
    """A block, or (module None) all that lies outside the blocks: members, their copies, and the places they stand in.

    copies: in each scratch that it may use, a list; out: their memory, as copies may be DTensors. pairs: each place, with
    the number of what it holds among the members, and its stand-in. scratch: whose copies it sees while it runs.
    """

    name: str
    module: nn.Module | None
    at: list[int] = field(default_factory=list)  # which of the step's members
    sweep: Sweep = NOTHING
    copies: list[list[nn.Parameter]] = field(default_factory=list)
    out: list[list[Tensor]] = field(default_factory=list)
    places: list[sites.Site] = field(default_factory=list)
    pairs: list[tuple[sites.Site, int, OutsideItsBlock]] = field(default_factory=list)
    devices: list[torch.device] = field(default_factory=list)
    scratch: int = 0
    shown: str = "weights"
    calls: int = 0

    def place(self, scratches: Sequence[Scratch]) -> None:
        """Makes its copies in each of these, and its stand-ins."""
        self.copies = [sites.copies(self.sweep, scratch.pools) for scratch in scratches]
        self.out = [list(map(parts.local, copies)) for copies in self.copies]
        self.devices = list(dict.fromkeys(m.param.device for m in self.sweep))
        number = {id(m.held): i for i, m in enumerate(self.sweep)}
        outside = [stand_in(m.held, m.name) for m in self.sweep]
        self.pairs = [(site, i, outside[i]) for site in self.places for i in (number[id(site.param)],)]

    def enter(self, what: str) -> None:
        """Puts the weights, the copies or the stand-ins into the module."""
        copies = self.copies[self.scratch] if what == "copies" else ()
        for site, i, outside in self.pairs:
            site.show(site.param if what == "weights" else copies[i] if what == "copies" else outside)

    def show(self, what: str) -> None:
        self.shown = self.shown if what == "weights" else what  # not the weights any more, should this break off
        self.enter(what)
        self.shown = what


def units_of(module: nn.Module, members: Sweep) -> list[Unit]:
    """What lies outside the blocks first, then each block that has members. Shared parameters count as outside."""
    blocks = find_blocks(module)
    reached_in = _reached_in(module, [block for _, block in blocks])
    found = sites.find(module, members, "stream")
    homes: dict[int, set[int | None]] = {}
    for site in found:
        homes.setdefault(id(site.param), set()).update(reached_in[id(site.owner)])
    units = {None: Unit("outside the blocks", None)} | {i: Unit(*entry) for i, entry in enumerate(blocks)}
    home = {p: next(iter(at)) if len(at) == 1 else None for p, at in homes.items()}
    for i, m in enumerate(members):
        units[home[id(m.held)]].at.append(i)
    for site in found:
        units[home[id(site.param)]].places.append(site)
    for unit in units.values():
        unit.sweep = members.piece(unit.at)
    return [unit for i, unit in units.items() if i is None or unit.at]


def _reached_in(module: nn.Module, blocks: Sequence[nn.Module]) -> dict[int, set[int | None]]:
    """For each submodule the blocks that hold it, None among them if it is reached past all blocks."""
    number = {id(block): i for i, block in enumerate(blocks)}
    found: dict[int, set[int | None]] = {}
    pending: list[tuple[nn.Module, int | None]] = [(module, None)]
    while pending:
        child, block = pending.pop()
        block = number.get(id(child)) if block is None else block
        if block not in found.setdefault(id(child), set()):
            found[id(child)].add(block)
            pending += [(c, block) for c in child._modules.values() if c is not None]
    return found


def largest(units: Sequence[Unit]) -> dict[tuple[torch.device, torch.dtype], int]:
    """Elements that the scratch of these blocks takes, by device and dtype."""
    wanted: dict[tuple[torch.device, torch.dtype], int] = {}
    for unit in units:
        for key, size in sites.sizes(unit.sweep).items():
            wanted[key] = max(wanted.get(key, 0), size)
    return wanted


def extra_bytes(module: nn.Module, *, prefetch: bool = False) -> int:
    """The memory that stream needs beside the trainable weights: the largest block's, with `prefetch` twice, and that of
    what lies outside."""
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    outside, *blocks = units_of(module, Sweep([Member(p, i, 0, name) for i, (name, p) in enumerate(trainable)]))
    wanted = [sites.sizes(outside.sweep), *[largest(blocks)] * (2 if prefetch else 1)]
    return sum(size * key[1].itemsize for sizes in wanted for key, size in sizes.items())
