"""As shadow, but one block at a time: a block's perturbed weights are written just before the block runs.

A block's active parameters go into a scratch that all blocks share, which the block sees until it has run.
Parameters outside the blocks (embeddings, final norm, head), and those that a block shares with anything else, have a
scratch of their own. So the extra memory is that of the largest block and of what lies outside: 4.5 % for OPT-13B.

While a closure runs, a block's parameters cannot be read from outside the block's own forward: their places hold
`OutsideItsBlock`, which refuses every operation by name, so that nothing is ever silently unperturbed. A block that the
closure never called is an error for the same reason, and so is a view of a block's weights that outlives its forward.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from zokern import parts
from zokern.layers import find_blocks
from zokern.passes.update import Terms
from zokern.placement import sites
from zokern.placement.base import NotSeen, RefusedCall, RefusedModule
from zokern.placement.shadow import Exact
from zokern.sweep import NOTHING, Member, Passes, Sweep


class OutsideItsBlock(nn.Parameter):
    """Stands in for a block's parameter while that block is not running; knows its shape, refuses to be computed with.

    It has no memory: whatever reads values ends at the dispatcher, also from C++, and finds none that are clean.
    """

    parameter: str
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        every = [*args, *(kwargs or {}).values()]
        flat = [a for x in every for a in (x if isinstance(x, (list, tuple)) else [x])]
        _refuse(*(a.parameter for a in flat if isinstance(a, cls)))

    def data_ptr(self) -> int:
        _refuse(self.parameter)

    def full_tensor(self, *_: Any, **__: Any) -> NoReturn:
        """A DTensor's."""
        _refuse(self.parameter)

    to_local = redistribute = full_tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":  # it would be lost
            _refuse(self.parameter)
        super().__setattr__(name, value)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<{self.parameter}, outside its block: {tuple(self.shape)} {self.dtype}>"


def _refuse(*names: str) -> NoReturn:
    listed = ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
    raise RefusedCall(
        f"{listed or 'a parameter'} was used outside its block's forward, where placement='stream' has no perturbed copy "
        "of it; use placement='shadow' for this model"
    )


def stand_in(param: Tensor, name: str) -> OutsideItsBlock:
    """For `param`, with its shape, dtype and device."""
    made: OutsideItsBlock = torch.Tensor._make_wrapper_subclass(
        OutsideItsBlock,
        param.shape,
        strides=param.stride(),
        dtype=param.dtype,
        device=param.device,
        requires_grad=param.requires_grad,
    )
    own = ("_local_tensor", "_spec")  # of a DTensor
    made.__dict__.update({key: value for key, value in param.__dict__.items() if key not in own})  # of libraries
    made.parameter = name
    return made


@dataclass
class Unit:
    """A block, or (module None) all that lies outside the blocks: members, their copies, and the places they stand in."""

    name: str
    module: nn.Module | None
    at: list[int] = field(default_factory=list)  # which of the step's members
    sweep: Sweep = NOTHING
    copies: list[nn.Parameter] = field(default_factory=list)
    out: list[Tensor] = field(default_factory=list)  # the copies' memory: they may be DTensors
    places: list[sites.Site] = field(default_factory=list)
    pairs: list[tuple[sites.Site, nn.Parameter, OutsideItsBlock]] = field(default_factory=list)  # copy, stand-in
    shown: str = "weights"
    calls: int = 0

    def enter(self, what: str) -> None:
        """Puts the weights, the copies or the stand-ins into the module."""
        for site, copy, outside in self.pairs:
            site.show(site.param if what == "weights" else copy if what == "copies" else outside)

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


def _largest(units: Sequence[Unit]) -> dict[tuple[torch.device, torch.dtype], int]:
    """Elements that the scratch of these blocks takes, by device and dtype."""
    wanted: dict[tuple[torch.device, torch.dtype], int] = {}
    for unit in units:
        for key, size in sites.sizes(unit.sweep).items():
            wanted[key] = max(wanted.get(key, 0), size)
    return wanted


def extra_bytes(module: nn.Module) -> int:
    """The memory that stream needs beside the trainable weights: the largest block's, and that of what lies outside."""
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    outside, *blocks = units_of(module, Sweep([Member(p, i, 0, name) for i, (name, p) in enumerate(trainable)]))
    return sum(
        size * key[1].itemsize
        for wanted in (sites.sizes(outside.sweep), _largest(blocks))
        for key, size in wanted.items()
    )


class Stream(Exact):
    name = "stream"

    def __init__(self) -> None:
        super().__init__()
        self.outside_pools: sites.Pools = {}
        self.block_pools: sites.Pools = {}
        self.units: list[Unit] = []
        self.layout: object = None
        self.kept: list[Unit] = []  # of the layout, without their members between steps
        self.terms: Terms = {}
        self.running: Unit | None = None
        self.last: Unit | None = None  # whose weights the scratch holds
        self.users: list[int] = []  # of each block pool: how many tensors look at it

    def bind(self, module: nn.Module | None, passes: Passes) -> None:
        self.module, self.passes = sites.needed(module, "stream"), passes
        refuse(self.module)

    def begin(self, sweep: Sweep, eps: Tensor, *, scaled: bool) -> None:
        super().begin(sweep, eps, scaled=scaled)
        self.units, hooks, module = self._lay_out(sweep), self.hooks, self.module
        hooks.append(module.register_state_dict_pre_hook(lambda *_: self._around_state_dict(clean=True)))
        hooks.append(module.register_state_dict_post_hook(lambda *_: self._around_state_dict(clean=False)))
        for unit in self.units[1:]:
            assert unit.module is not None
            # First and last of the block's hooks, so that those of the user see what the forward sees.
            before, after = _opaque(self._before, unit, self), _opaque(self._after, unit, self)
            hooks.append(unit.module.register_forward_pre_hook(before, prepend=True))
            hooks.append(unit.module.register_forward_hook(after, always_call=True))

    def _lay_out(self, members: Sweep) -> list[Unit]:
        """The units of these members, each with its copies; those of the last time where nothing has changed."""
        layout = sites.fingerprint(self.module), members.layout
        if layout == self.layout and not self.moved(out for unit in self.kept for out in unit.out):
            for unit in self.kept:
                unit.sweep = members.piece(unit.at)
            return self.kept
        refuse_compiled(self.module)  # it may have been since
        for unit in self.kept:  # views of the pools, which may be replaced; the hooks of this step hold the units
            unit.copies, unit.out, unit.pairs = [], [], []
        self.kept, self.ready, self.probes, self.layout = [], {}, [], None
        self.let_go()
        units = units_of(self.module, members)
        sites.fit(self.block_pools, _largest(units[1:]))
        sites.fit(self.outside_pools, sites.sizes(units[0].sweep))
        for i, unit in enumerate(units):
            unit.copies = sites.copies(unit.sweep, self.block_pools if i else self.outside_pools)
            unit.out = list(map(parts.local, unit.copies))
            shown = {
                id(m.held): (copy, stand_in(m.held, m.name)) for m, copy in zip(unit.sweep, unit.copies, strict=True)
            }
            unit.pairs = [(site, *shown[id(site.param)]) for site in unit.places]
        self.kept, self.layout = units, layout
        self.places = [out.data_ptr() for unit in units for out in unit.out]
        return units

    def arrange(self, sweep: Sweep) -> Mapping[int, Tensor]:
        """What lies outside the blocks, and the first block: others have no room before they run."""
        units = self._lay_out(sweep)
        return {id(m.param): out for unit in units[:2] for m, out in zip(unit.sweep, unit.out, strict=True)}

    @property
    def copies(self) -> list[nn.Parameter]:
        """All of them, as a closure sees them."""
        return [copy for unit in self.kept for copy in unit.copies]

    def memory(self) -> list[Tensor]:
        return [*self.outside_pools.values(), *self.block_pools.values()]

    @contextlib.contextmanager
    def present(self, terms: Terms) -> Iterator[None]:
        if not terms:
            yield
            return
        outside, *blocks = self.units
        self.passes.counters.passes += 1  # one sweep over the active parameters, in pieces
        self.perturb(outside.sweep, terms, outside.out, counted=False)
        self.terms, self.last, self.saving = terms, None, False
        try:
            outside.show("copies")
            for unit in blocks:
                unit.calls = 0
                unit.show("outside")
            yield
            self.check_saved()
            idle = [unit.name for unit in blocks if unit.calls == 0]
            if idle and len(idle) == len(blocks):
                raise NotSeen(
                    "the closure called no block of the module that the optimizer was given, so it runs something "
                    "else: a copy, "
                    "a trace, an export, an engine. Call the module itself; where the other one shares its memory, "
                    "placement='inplace' reaches it"
                )
            if idle:
                raise RefusedCall(
                    f"the closure did not call {', '.join(idle[:4])}{' ...' if len(idle) > 4 else ''}, whose perturbed "
                    "weights were therefore not seen; use placement='shadow' for this model"
                )
        finally:
            self.terms, self.running = {}, None
            for unit in self.units:
                unit.show("weights")

    def end(self) -> None:
        self.left = self  # until all is back
        self.terms, self.running = {}, None
        for unit in self.units:
            if unit.shown != "weights":
                unit.show("weights")
        self.remove_hooks()
        for unit in self.kept:
            unit.sweep = NOTHING  # states are among what it holds, which a load replaces
        self.units, self.last, self.left = [], None, None
        self.leave()

    def _before(self, unit: Unit) -> None:
        if not self.terms:
            return
        self.check_saved()
        if self.running is not None:
            raise RefusedCall(
                f"{unit.name} was called while {self.running.name} runs, and placement='stream' has room for one block; "
                "use placement='shadow' for this model"
            )
        for site, _, outside in unit.pairs:
            if site.owner._parameters.get(site.name) is not outside:
                raise NotSeen(
                    f"{outside.parameter} was replaced inside the closure, as functional_call does, so "
                    "placement='stream' cannot "
                    "show its perturbed copy. Call the module itself; or, with placement='shadow', take the "
                    "parameters that "
                    "functional_call gets inside the closure; or, with placement='inplace', give it those of the module"
                )
        self._refuse_views()
        self.last = unit
        self._realise()
        for other in self.units[1:] if self.ready else []:  # the scratch they share is written now
            if other is not unit:
                for member in other.sweep:
                    self.ready.pop(id(member.param), None)
        self.perturb(unit.sweep, self.terms, unit.out, counted=False)
        self.users = self._count_users()  # the pass' own views among them, which are kept for the next
        unit.calls += 1
        unit.show("copies")
        self.running = unit

    def _after(self, unit: Unit) -> None:
        if self.running is unit:
            unit.show("outside")
            self.running = None

    def _count_users(self) -> list[int]:
        return [torch._C._storage_Use_Count(pool.untyped_storage()._cdata) for pool in self.block_pools.values()]

    def _refuse_views(self) -> None:
        """What the last block returned or stored may be a view of its weights, which are about to be overwritten."""
        now = self._count_users()
        if self.last is not None and any(n > own for n, own in zip(now, self.users, strict=True)):
            gc.collect()  # it may be one that nobody can reach
            now = self._count_users()
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

    def _around_state_dict(self, *, clean: bool) -> None:
        """A state_dict() asked for inside the closure is of the weights."""
        self.saving = clean
        for unit in self.units if self.terms else []:
            unit.enter("weights" if clean else unit.shown)


def freezing() -> bool:
    """Whether torch's compiler, if it has been used, makes constants of weights."""
    inductor = sys.modules.get("torch._inductor.config")
    return inductor is not None and bool(inductor.freezing)


def _opaque(hook: Callable[[Unit], None], unit: Unit, stream: Stream) -> Callable[..., None]:
    """A module's hook, of `stream`, that torch's compiler does not look into."""

    behind = _behind_the_compiler()

    def call(*_: object) -> None:
        if torch.compiler.is_compiling():
            behind(hook, unit, stream)
        else:
            hook(unit)

    return call


@functools.cache
def _behind_the_compiler() -> Callable[[Callable[[Unit], None], Unit, Stream], None]:
    made: Callable[[Callable[[Unit], None], Unit, Stream], None] = torch.compiler.disable(
        _between_graphs,
        reason="placement='stream' changes weights between blocks; without fullgraph it runs, and shadow runs with it",
    )
    return made


def _between_graphs(hook: Callable[[Unit], None], unit: Unit, stream: Stream) -> None:
    if stream.terms and torch.compiler.is_compiling():  # still, as in an export that runs the module
        raise RefusedCall("placement='stream' cannot run under torch.compile; use placement='shadow'")
    hook(unit)


def refuse(module: nn.Module) -> None:
    """Modules that stream cannot serve, with the remedy."""
    sites.refuse_unswappable(module, "stream")
    if not find_blocks(module):
        raise RefusedModule(
            f"placement='stream' works block by block, and {type(module).__name__} has no nn.ModuleList of equal blocks; "
            "use placement='shadow'"
        )
    refuse_compiled(module)


def refuse_compiled(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if type(child).__name__ == "OptimizedModule" or getattr(child, "_compiled_call_impl", None) is not None:
            raise RefusedModule(
                f"placement='stream' works through hooks, which {name or 'the module'}, compiled by torch.compile, does "
                "not run; use placement='shadow', or give the module that is not compiled"
            )
