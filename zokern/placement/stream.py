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
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from zokern.layers import find_blocks
from zokern.passes.update import Terms
from zokern.placement import sites
from zokern.placement.base import NotSeen, RefusedCall, RefusedModule
from zokern.placement.shadow import Exact
from zokern.placement.units import Scratch, Unit, largest, units_of
from zokern.placement.units import extra_bytes as extra_bytes  # its public name is here
from zokern.sweep import NOTHING, Passes, Sweep


class Stream(Exact):
    """scratches: how many the blocks take in turn."""

    name = "stream"

    def __init__(self, scratches: int = 1) -> None:
        super().__init__()
        self.outside = Scratch()  # of what lies outside the blocks
        self.scratches = [Scratch() for _ in range(scratches)]
        self.units: list[Unit] = []
        self.layout: object = None
        self.kept: list[Unit] = []  # of the layout, without their members between steps
        self.terms: Terms = {}
        self.running: Unit | None = None

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
        if layout == self.layout and not self.moved(self._copies()):
            for unit in self.kept:
                unit.sweep = members.piece(unit.at)
            return self.kept
        refuse_compiled(self.module)  # it may have been since
        for unit in self.kept:  # views of the pools, which may be replaced; the hooks of this step hold the units
            unit.copies, unit.out, unit.pairs = [], [], []
        self.kept, self.ready, self.probes, self.layout = [], {}, [], None
        self.let_go()
        units = units_of(self.module, members)
        wanted = largest(units[1:])
        for scratch in self.scratches:
            sites.fit(scratch.pools, wanted)
        sites.fit(self.outside.pools, sites.sizes(units[0].sweep))
        for i, unit in enumerate(units):
            unit.place(self.scratches if i else [self.outside])
        self.kept, self.layout = units, layout
        self.places = list(map(Tensor.data_ptr, self._copies()))
        return units

    def _copies(self) -> Iterator[Tensor]:
        """The memory of all copies."""
        return (t for unit in self.kept for out in unit.out for t in out)

    def arrange(self, sweep: Sweep) -> Mapping[int, Tensor]:
        """What lies outside the blocks, and the first block: others have no room before they run."""
        units = self._lay_out(sweep)
        return {id(m.param): out for unit in units[:2] for m, out in zip(unit.sweep, unit.out[0], strict=True)}

    @property
    def copies(self) -> list[nn.Parameter]:
        """All of them, as a closure sees them."""
        return [copy for unit in self.kept for copies in unit.copies for copy in copies]

    def memory(self) -> list[Tensor]:
        return [pool for scratch in (self.outside, *self.scratches) for pool in scratch.pools.values()]

    @contextlib.contextmanager
    def present(self, terms: Terms) -> Iterator[None]:
        if not terms:
            yield
            return
        outside, *blocks = self.units
        self.passes.counters.passes += 1  # one sweep over the active parameters, in pieces
        self.perturb(outside.sweep, terms, outside.out[0], counted=False)
        self.terms, self.saving = terms, False
        self._hold_nothing()
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
        self.units, self.left = [], None
        self._hold_nothing()
        self.leave()

    def _hold_nothing(self) -> None:
        for scratch in self.scratches:
            scratch.last = None

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
        unit.scratch = self._written(unit)
        unit.calls += 1
        unit.show("copies")
        self.running = unit

    def _after(self, unit: Unit) -> None:
        if self.running is unit:
            unit.show("outside")
            self.running = None

    def _written(self, unit: Unit) -> int:
        """Writes the block's perturbed weights, and says to which scratch."""
        self._take(unit, 0)
        self._write(unit, 0, self.terms)
        return 0

    def _take(self, unit: Unit, number: int) -> None:
        """The scratch is to be the block's: nobody else may look at it any more."""
        scratch = self.scratches[number]
        scratch.ahead = False
        scratch.refuse_views()
        scratch.last = unit
        self._realise()
        # What an update has filled ahead lies in the first scratch, which a forward's first block takes.
        for other in self.units[1:] if self.ready else []:
            if other is not unit:
                for member in other.sweep:
                    self.ready.pop(id(member.param), None)

    def _write(self, unit: Unit, number: int, terms: Terms) -> None:
        self.perturb(unit.sweep, terms, unit.out[number], counted=False)
        self.scratches[number].count()

    def _around_state_dict(self, *, clean: bool) -> None:
        """A state_dict() asked for inside the closure is of the weights."""
        self.saving = clean
        for unit in self.units if self.terms else []:
            unit.enter("weights" if clean else unit.shown)


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
