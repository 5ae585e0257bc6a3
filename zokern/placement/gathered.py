"""Exact placements of a module of FSDP2, which computes with gathered weights that it frees after each block.

Gathered (stream): a block's gathered weights are perturbed just before the block runs. They are a scratch that FSDP2 has
anyway, so nothing is copied; each rank makes the noise of whole tensors, which costs a pass over them, and sends nothing.
While a block's weights are not gathered, its places in the module refuse to be computed with, as under stream elsewhere.
Kept (shadow): each rank's shards are perturbed where they are, and put back from a copy of them after each probe.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zokern import parts
from zokern.passes.update import Terms
from zokern.placement import fsdp, sites
from zokern.placement.base import NotSeen, Perturbing, RefusedCall
from zokern.placement.outside import stand_in
from zokern.placement.shadow import Exact, Shown
from zokern.placement.stream import refuse_compiled
from zokern.sweep import Member, Passes, Sweep

SCALED = (
    "the directions of this method are divided by the root of a curvature, of which a rank has its shards alone, so "
    "placement='stream' cannot perturb gathered weights along them; use placement='shadow', which perturbs shards"
)
PIPELINED = (
    "pipelined=True writes the next perturbation to copies of whole weights, and there are none of a module of FSDP2; "
    "leave it out"
)
FORWARD = (
    "placement='forward' puts stand-ins in the place of weights, and those of FSDP2 and tensor parallel are gathered and "
    "computed with by torch's own code; use placement='stream' or 'shadow'"
)


def refuse(module: nn.Module) -> None:
    """Modules of FSDP2 that `Gathered` cannot serve, with the remedy."""
    sites.refuse_unswappable(module, "stream")
    refuse_compiled(module)


@dataclass(eq=False)
class Unit:
    """What one call of `fully_shard` gathers. members: with a place that each has in the module. places: all of them, with
    what stands there while nothing is gathered. fresh: what is gathered next, or was just now, is not perturbed yet."""

    name: str
    modules: list[Any] = field(default_factory=list)
    members: list[tuple[sites.Site, Member]] = field(default_factory=list)
    places: list[tuple[sites.Site, nn.Parameter]] = field(default_factory=list)
    calls: int = 0
    fresh: bool = True

    def is_sharded(self) -> bool:
        site, outside = self.places[0]
        entry = site.owner._parameters.get(site.name)
        return entry is site.param or entry is outside

    def show(self, *, outside: bool) -> None:
        """Shards, or what refuses to be computed with; gathered weights stay."""
        for site, one in self.places:
            if site.owner._parameters.get(site.name) is (site.param if outside else one):
                site.show(one if outside else site.param)


class Gathered(Shown):
    name = "stream"

    def __init__(self) -> None:
        super().__init__()
        self.units: list[Unit] = []
        self.outside = Sweep(())  # what no call of fully_shard has taken
        self.out: list[Tensor] = []
        self.terms: Terms = {}

    def bind(self, module: nn.Module | None, passes: Passes) -> None:
        super().bind(module, passes)
        refuse(self.module)

    def begin(self, sweep: Sweep, eps: Tensor, *, scaled: bool) -> None:
        Perturbing.begin(self, sweep, eps, scaled=scaled)
        tree = sites.fingerprint(self.module), sweep.layout
        if tree != self.tree:
            refuse_compiled(self.module)  # it may have been since
            self._arrange(sweep)
            self.tree = tree
        hooks, module = self.hooks, self.module
        hooks.append(module.register_state_dict_pre_hook(lambda *_: self._around_state_dict(copies=False)))
        hooks.append(module.register_state_dict_post_hook(lambda *_: self._around_state_dict(copies=True)))
        for unit in self.units:
            for one in unit.modules:  # before FSDP2's own hook, and after it
                hooks.append(one.register_forward_pre_hook(_hook(self._before, unit), prepend=True))
                hooks.append(one.register_forward_pre_hook(_hook(self._gathered, unit)))
                hooks.append(one.register_forward_hook(_hook(self._after, unit), always_call=True))

    def _arrange(self, sweep: Sweep) -> None:
        """What gathers each member, and copies of those that nothing gathers."""
        modules = fsdp.modules_of(self.module)
        names = {id(one): name for name, one in self.module.named_modules()}
        units: dict[int, Unit] = {}
        homes: dict[tuple[int, str], Unit] = {}
        for one in modules:
            state = one._get_fsdp_state()
            unit = units.setdefault(id(state), Unit(names[id(one)] or type(one).__name__))
            unit.modules.append(one)
            homes.update(dict.fromkeys(_places(state), unit))
        every = (*sweep, *sweep.absent)  # a rank computes with the whole of what it has no element of
        found = sites.find(self.module, every, "stream")
        members = {id(m.held): m for m in every}
        outside: list[sites.Site] = []
        stand_ins: dict[int, nn.Parameter] = {}
        for site in found:
            home, member = homes.get((id(site.owner), site.name)), members[id(site.param)]
            if home is None:
                outside.append(site)
            else:
                if id(member.held) not in stand_ins:
                    stand_ins[id(member.held)] = stand_in(member.held, member.name)
                    home.members.append((site, member))
                home.places.append((site, stand_ins[id(member.held)]))
        self.units = [unit for unit in units.values() if unit.members]
        self.copies, self.out, self.pairs = [], [], []
        self.let_go()
        ids = {id(site.param) for site in outside}
        self.outside = Sweep([m for m in sweep if id(m.held) in ids])
        sites.fit(self.pools, sites.sizes(self.outside))
        self.copies = sites.copies(self.outside, self.pools)
        self.out = list(map(parts.local, self.copies))
        shown = {id(m.held): copy for m, copy in zip(self.outside, self.copies, strict=True)}
        self.pairs = [(site, shown[id(site.param)]) for site in outside]

    def end(self) -> None:
        self.terms, pairs = {}, self.pairs
        super().end()
        self.pairs = pairs

    @contextlib.contextmanager
    def present(self, terms: Terms) -> Iterator[None]:
        if not terms:
            yield
            return
        self.passes.counters.passes += 1  # one sweep over the active parameters, in pieces
        self.perturb(self.outside, terms, self.out, counted=False)
        for unit in self.units:
            unit.calls, unit.fresh = 0, True
        self.terms = terms
        try:
            self._show(copies=True)
            self.saving = False
            yield
            self.check_saved()
            self._check_called()
        finally:
            self.terms = {}
            self._show(copies=False)

    def _enter(self, copies: bool) -> None:
        super()._enter(copies)
        for unit in self.units:
            unit.show(outside=copies)

    def _check_called(self) -> None:
        idle = [unit.name for unit in self.units if unit.calls == 0]
        if idle and len(idle) == len(self.units):
            raise NotSeen(
                "the closure called no module of FSDP2 of the module that the optimizer was given, so it runs something "
                "else: call the module itself"
            )
        if idle:
            raise RefusedCall(
                f"the closure did not call {', '.join(idle[:4])}{' ...' if len(idle) > 4 else ''}, whose perturbed weights "
                "were therefore not seen; use placement='shadow' for this model"
            )

    def _before(self, unit: Unit) -> None:
        if self.terms:
            unit.fresh = unit.fresh or unit.is_sharded()

    def _after(self, unit: Unit) -> None:
        if self.terms:
            unit.show(outside=True)

    def _gathered(self, unit: Unit) -> None:
        """The weights are gathered: all of a tensor, or a rank's part of it in tensor parallel."""
        if not self.terms:
            return
        unit.calls += 1
        if unit.fresh:
            self._write(unit, self.terms)

    def _write(self, unit: Unit, terms: Terms) -> None:
        """Perturbs what has just been gathered."""
        members = []
        for site, m in unit.members:
            whole = site.owner._parameters.get(site.name)
            if whole is None or whole is site.param:
                raise NotSeen(
                    f"{m.name} was not gathered before {unit.name} ran, or was replaced, so that placement='stream' cannot "
                    "perturb what it computes with; call the module itself"
                )
            part = parts.part(whole, m.name)
            if part.local.numel():
                members.append(Member(part.local.detach(), m.tensor_id, m.row, m.name, {}, *part[1:]))
        torch.clear_autocast_cache()
        self.passes.run(
            Sweep(members), self.spec, self.numbers_of(terms), out=[m.param for m in members], counted=False
        )
        unit.fresh = False


def _places(state: Any) -> Iterator[tuple[int, str]]:
    """Where the modules have what a state of FSDP2 gathers: ids of modules, and names."""
    for group in fsdp.groups_of(state):
        for one in group.fsdp_params:
            info = one._module_info
            yield id(info.module), info.param_name
            yield from zip(map(id, info.shared_modules), info.shared_param_names, strict=True)


def _hook(act: Any, unit: Unit) -> Any:
    def call(*_: object) -> None:
        act(unit)

    return call


class Kept(Exact):
    name = "shadow"

    def __init__(self) -> None:
        super().__init__()
        self.pools: sites.Pools = {}
        self.layout: object = None
        self.kept: Sequence[Tensor] = []  # copies of the step's members
        self.source = Sweep(())  # the members, with the copies in the place of their weights
        self.presented = False

    def bind(self, module: nn.Module | None, passes: Passes) -> None:
        self.module, self.passes = sites.needed(module, self.name), passes

    def begin(self, sweep: Sweep, eps: Tensor, *, scaled: bool) -> None:
        super().begin(sweep, eps, scaled=scaled)
        key = sweep.layout, list(map(id, sweep.params)), [list(map(id, m.states.values())) for m in sweep]
        if key != self.layout:
            self.layout, self.kept, self.source = None, [], Sweep(())
            self.let_go()
            sites.fit(self.pools, sites.sizes(sweep))
            plain = [m._replace(dtensor=None) for m in sweep]
            self.kept = [copy.detach() for copy in sites.copies(plain, self.pools)]
            copied = [m._replace(param=copy) for m, copy in zip(sweep, self.kept, strict=True)]
            self.source, self.layout = Sweep(copied, sweep.absent), key
        self.hooks.append(self.module.register_state_dict_pre_hook(self._refuse_saving))
        for copy, p in zip(self.kept, sweep.params, strict=True):
            copy.copy_(p)

    def _refuse_saving(self, *_: object) -> None:
        if self.presented:
            raise RefusedCall(
                "a state_dict() inside the closure would be of perturbed weights, which lie where the weights do; ask for "
                "it between two steps"
            )

    def memory(self) -> list[Tensor]:
        return list(self.pools.values())

    def arrange(self, sweep: Sweep) -> Mapping[int, Tensor]:
        raise ValueError(PIPELINED)

    @contextlib.contextmanager
    def present(self, terms: Terms) -> Iterator[None]:
        if not terms:
            yield
            return
        self.presented = True
        try:
            self.perturb(self.source, terms, self.sweep.params)
            yield
        finally:
            self._put_back()

    def _put_back(self) -> None:
        for copy, p in zip(self.kept, self.sweep.params, strict=True):
            p.copy_(copy)
        self.presented = False

    def end(self) -> None:
        self.left = self  # until all is back
        if self.presented:
            self._put_back()
        self.remove_hooks()
        self.left = None
        self.leave()
