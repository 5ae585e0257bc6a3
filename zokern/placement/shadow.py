"""Forwards see a perturbed copy of the active parameters; the weights' own storage is written by updates alone.

The copy is one allocation for each device and dtype, which serves every step that needs no more than it has: LeZO's
active layers change from step to step, and their copies share it. While a closure runs, the module's entries for the
active parameters are the copies; before and after, and in a state_dict() of the module asked for from inside the
closure, they are the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zokern import parts
from zokern.contract.rules import RULES
from zokern.directions import DIRECTIONS
from zokern.passes.spec import MAX_CHAIN_SEEDS, PassNumbers, PassSpec, pass_spec
from zokern.passes.update import CPU, Terms, Update, is_known, packed, perturbation, seed_tensor
from zokern.placement import sites
from zokern.placement.base import Ahead, Perturbing, Rounding
from zokern.placement.ready import TRUSTED, Copies, Promise, Ready, maker, promise
from zokern.sweep import Passes, Sweep, run

ON = torch.ones(1, dtype=torch.int32, device=CPU)  # what enables a pass


class Exact(Perturbing):
    """What placements share that leave the weights alone: the update works on clean weights.

    Pipelined, the update writes the next step's first perturbation too, while it has the new weights in registers: into
    the copies that are there for the next step. They are used if that is then asked for and the weights are as they were.
    """

    module: nn.Module
    name: str

    def __init__(self) -> None:
        super().__init__()
        self.saving = False  # a state_dict() asked for inside the closure is under way
        self.ready: dict[int, Ready] = {}  # by the parameter's id
        self.promised: Promise | None = None  # the same, of a launch
        self.forked: Copies = []  # what the last pipelined update has written
        self.probes: list[Tensor | None] = []  # of the last update
        self.places: list[int] = []  # addresses of all copies
        self.latest: tuple[Terms, Tensor, PassNumbers | None] = {}, self.eps, None  # of the last perturbation
        self.hooks: list[RemovableHandle] = []  # only during a step: a module that keeps them cannot be pickled

    def moved(self, copies: Iterable[Tensor]) -> bool:
        """Whether a closure has put a copy elsewhere, through .data."""
        return self.places != list(map(Tensor.data_ptr, copies))

    def forget(self) -> None:
        """States were loaded, or a tensor is another one: what was made ready for the next step is of others."""
        self.ready, self.promised, self.forked = {}, None, []

    def overwritten(self) -> None:
        """A captured step has written to the copies."""
        self.ready, self.promised = {}, None

    def remove_hooks(self) -> None:
        while self.hooks:
            self.hooks[-1].remove()
            self.hooks.pop()

    def check_saved(self) -> None:
        if self.saving:
            raise RuntimeError(
                "a state_dict() asked for inside the closure failed, and the closure went on with unperturbed weights"
            )

    def perturb(self, sweep: Sweep, terms: Terms, out: Sequence[Tensor], *, counted: bool = True) -> None:
        """Writes the members' perturbed weights to `out`, but for those that are there already."""
        numbers = self.numbers_of(terms)
        self._realise()
        if self.ready:
            held = [self.ready.pop(id(m.param), None) for m in sweep]
            wanted = maker(terms, self.eps.tolist()) if any(one is not TRUSTED for one in held if one) else None
            pairs = [
                (m, t)
                for one, m, t in zip(held, sweep, out, strict=True)
                if one is not TRUSTED and (one is None or wanted is None or one != wanted(m, t))
            ]
            sweep, out = Sweep([m for m, _ in pairs]), [t for _, t in pairs]
        torch.clear_autocast_cache()  # of casts of what the copies hold still
        self.passes.run(sweep, self.spec, numbers, out=out, counted=counted)

    def numbers_of(self, terms: Terms) -> PassNumbers:
        """Those of the pass to these terms, made once."""
        terms_before, eps, numbers = self.latest
        if numbers is None or terms_before is not terms or eps is not self.eps:
            numbers = self._numbers(terms)
            self.latest = terms, self.eps, numbers
        return numbers

    def _numbers(self, terms: Terms) -> PassNumbers:
        return perturbation(self.eps, terms, self.still, None)  # copies are written while a captured step is tried, too

    def _realise(self) -> None:
        """What a launch has promised, where an eager step asks."""
        if self.promised is not None:
            if not self.ready:
                self.ready = self.promised.ready()
            self.promised = None

    def trust(self, sweep: Sweep, copies: bool) -> None:
        """Before a step that is captured: whether its first probe is in the copies that an update fills ahead."""
        self.ready, self.promised = {}, None
        if copies:
            self.ready = dict.fromkeys(self.arrange(sweep), TRUSTED)

    def promise(self, copies: Copies, terms: Terms, eps: Sequence[float]) -> None:
        """A launch has filled these for the step after it, which is along `terms`; eps: each row's."""
        self.promised = promise(copies, terms, eps)

    def is_ready(self, sweep: Sweep, terms: Terms, eps: Sequence[float]) -> bool:
        """Whether all copies that an update fills ahead hold the perturbation by these terms."""
        if self.promised is not None:
            return self.promised.holds(terms, eps)
        if not self.ready:
            return False
        made, members = maker(terms, eps), {id(m.param): m for m in sweep}
        there = self.arrange(sweep)
        return all(self.ready.get(key) == made(members[key], copy) for key, copy in there.items())

    def arrange(self, sweep: Sweep) -> Mapping[int, Tensor]:
        """Makes the copies of a step with these members, and says which can be filled before it, by parameter's id."""
        raise NotImplementedError

    def update(self, update: Update, ok: Tensor, rounding: Rounding, ahead: Ahead | None = None) -> None:
        rule, coefs = RULES[update.rule], dict(update.coefs)
        if "A" in rule.coefs and "A" not in coefs:  # nothing is to be restored
            coefs["A"] = torch.zeros_like(coefs["G"])
        numbers = packed(rule, coefs, update.shared)
        if update.rule == "axpy":  # adding 0*z would turn -0.0 into +0.0: a pass that moves nothing writes nothing
            ok = self._moves(ok, *numbers)
        enabled = ON if is_known(ok, self.passes.gate) else ok.reshape(1).to(torch.int32)
        spec = pass_spec(rule, self.passes.direction, rounding.name, update.square_of_sum, update.keep_second)
        given = PassNumbers(seed_tensor(update.seeds), *numbers, rounding.seeds, enabled)
        self.ready = {}
        torch.clear_autocast_cache()
        if ahead is None or len(update.seeds) + len(ahead.terms) > MAX_CHAIN_SEEDS:
            self.passes.run(self.sweep, spec, given)
        else:
            self._update_and_perturb(spec, given, ahead)

    def _moves(self, ok: Tensor, coefs: Tensor, decay: Tensor) -> Tensor:
        """ok, and whether the pass moves anything."""
        if not is_known(ok, self.passes.gate):
            return ok & ((coefs != 0).any() | (decay != 1).any())
        return ok if any(coefs.flatten().tolist()) or set(decay.flatten().tolist()) != {1.0} else torch.zeros_like(ok)

    def _update_and_perturb(self, spec: PassSpec, numbers: PassNumbers, ahead: Ahead) -> None:
        copies = self.arrange(ahead.sweep)
        probes = [copies.get(id(m.param)) for m in self.sweep]
        if len(probes) == len(self.probes) and all(a is b for a, b in zip(probes, self.probes, strict=True)):
            probes = self.probes  # the same list, so that its addresses are known
        self.probes = probes
        stages = [(spec, numbers), (self.spec, self._numbers(ahead.terms))]
        self.passes.chain(self.sweep, stages, spec.rule, probes=probes, enabled=numbers.enabled)
        self.forked = [(m, probe) for m, probe in zip(self.sweep, probes, strict=True) if probe is not None]
        if self.passes.gate is None:  # of a captured step the host knows when it is launched
            # Should this fail, the step is done all the same, and the next one writes its copies itself.
            made = maker(ahead.terms, self.eps.tolist())
            self.ready = {id(m.param): made(m, probe) for m, probe in self.forked}


class Shown(Exact):
    """While a closure runs, the module's entries for the active parameters are others, in all places that one has."""

    def __init__(self) -> None:
        super().__init__()
        self.pools: sites.Pools = {}
        self.copies: list[nn.Parameter] = []
        self.layout: object = None
        self.tree: tuple[object, object] | None = None
        self.sites: list[sites.Site] = []  # in that tree
        self.pairs: list[tuple[sites.Site, nn.Parameter]] = []  # each with what is shown there
        self.presented = False
        self.plain = True  # copies are of all members, or hold the weights where gates leave these out

    def bind(self, module: nn.Module | None, passes: Passes) -> None:
        self.module, self.passes = sites.needed(module, self.name), passes
        sites.refuse_unswappable(self.module, self.name)

    def begin(self, sweep: Sweep, eps: Tensor, *, scaled: bool) -> None:
        super().begin(sweep, eps, scaled=scaled)
        self.plain = sweep.gates is None
        shown = self._lay_out(sweep)
        tree = sites.fingerprint(self.module), self.layout
        if tree != self.tree:
            self.sites, self.tree = sites.find(self.module, sweep, self.name), tree
        self.pairs = [(site, shown[id(site.param)]) for site in self.sites]
        hooks, module = self.hooks, self.module
        hooks.append(module.register_state_dict_pre_hook(lambda *_: self._around_state_dict(copies=False)))
        hooks.append(module.register_state_dict_post_hook(lambda *_: self._around_state_dict(copies=True)))

    def _lay_out(self, members: Sweep) -> Mapping[int, nn.Parameter]:
        """What is shown for each member, by the id of what the module has."""
        raise NotImplementedError

    def memory(self) -> list[Tensor]:
        return list(self.pools.values())

    def end(self) -> None:
        self.left = self  # until all is back
        if self.presented:
            self._show(copies=False)
        self.remove_hooks()
        self.pairs, self.left = [], None
        self.leave()

    def _show(self, *, copies: bool) -> None:
        self.presented = self.presented or copies  # some of them at least, should this break off
        self._enter(copies)
        self.presented = copies

    def _enter(self, copies: bool) -> None:
        for site, shown in self.pairs:
            site.show(shown if copies else site.param)

    def _around_state_dict(self, *, copies: bool) -> None:
        """A state_dict() asked for while the copies are shown is of the weights."""
        self.saving = not copies
        if self.presented:
            self._enter(copies)


class Shadow(Shown):
    name = "shadow"

    def __init__(self) -> None:
        super().__init__()
        self.out: list[Tensor] = []  # the copies' memory: they may be DTensors
        self.closed: dict[
            int, tuple[Tensor, Sweep]
        ] = {}  # of a sweep with gates: gates of what these leave out, and it

    def _copy_what_is_left_out(self) -> None:
        """Forwards see copies of all members, though gates let through some: the others' are the weights, once a step.
        Without directions a pass is a copy: one with a coefficient of 0 would make -0.0 of weights 0.0."""
        if self.plain:
            return
        self.plain = True  # for the rest of the step, as no pass changes them
        others, gates = self.sweep.left_out, self.sweep.gates
        assert gates is not None
        assert others.gates is not None
        torch.sub(torch.ones_like(gates), gates, out=others.gates)
        rows = len(self.eps)
        nothing = torch.zeros(rows, 1, 0, dtype=torch.float32, device=gates.device)
        seeds = torch.zeros(0, dtype=torch.int64, device=gates.device)
        numbers = PassNumbers(seeds, nothing, self.still)
        for operands in others.operands((), self.out):
            run(operands, pass_spec(RULES["axpy"], DIRECTIONS["normal"]), numbers, self.passes.backend)

    def _lay_out(self, members: Sweep) -> Mapping[int, nn.Parameter]:
        """Each member's copy."""
        if self.moved(self.out) or members.layout != self.layout:
            self.copies, self.out, self.ready, self.probes = [], [], {}, []  # views of the pools, which may be replaced
            self.layout = None
            self.let_go()
            sites.fit(self.pools, sites.sizes(members))
            self.copies = sites.copies(members, self.pools)
            self.out = list(map(parts.local, self.copies))
            self.layout, self.places = members.layout, list(map(Tensor.data_ptr, self.out))
        return {id(m.held): copy for m, copy in zip(members, self.copies, strict=True)}

    def arrange(self, sweep: Sweep) -> Mapping[int, Tensor]:
        self.pairs = []
        self._lay_out(sweep)
        return {id(m.param): out for m, out in zip(sweep, self.out, strict=True)}

    @contextlib.contextmanager
    def present(self, terms: Terms) -> Iterator[None]:
        if not terms:
            yield
            return
        self._copy_what_is_left_out()
        self.perturb(self.sweep, terms, self.out)
        try:
            self._show(copies=True)
            self.saving = False
            yield
            self.check_saved()
        finally:
            self._show(copies=False)
