"""Forwards see a perturbed copy of the active parameters; the weights' own storage is written by updates alone.

The copy is one allocation for each device and dtype, which serves every step that needs no more than it has: LeZO's
active layers change from step to step, and their copies share it. While a closure runs, the module's entries for the
active parameters are the copies; before and after, and in a state_dict() of the module asked for from inside the
closure, they are the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zokern.backends.scalars import MAX_CHAIN_SEEDS
from zokern.optim.update import Ahead, Update
from zokern.placement import sites
from zokern.sweep import Member, Numbers, Passes, Terms, perturbation


@dataclass(frozen=True)
class Ready:
    """A copy that holds a perturbation which is yet to be asked for: of which weights, in which state, and by what."""

    address: int
    versions: tuple[int, ...]  # of the weights and the states: torch counts what is done to them
    eps: float
    terms: Terms


class Exact:
    """What placements share that leave the weights alone: the update works on clean weights.

    Pipelined, the update writes the next step's first perturbation too, while it has the new weights in registers: into
    the copies that are there for the next step. They are used if that is then asked for and the weights are as they were.
    """

    def __init__(self, module: nn.Module, passes: Passes) -> None:
        self.module = module
        self.passes = passes
        self.members: Sequence[Member] = ()
        self.eps = torch.empty(0)
        self.rule = "axpy"
        self.saving = False  # a state_dict() asked for inside the closure is under way
        self.ready: dict[int, Ready] = {}  # by the parameter's id
        self.told: tuple[Terms, Tensor, Numbers] = {}, self.eps, Numbers([], {})  # of the last perturbation

    def check_saved(self) -> None:
        if self.saving:
            raise RuntimeError(
                "a state_dict() asked for inside the closure failed, and the closure went on with unperturbed weights"
            )

    def perturb(self, members: Sequence[Member], terms: Terms, out: Sequence[Tensor], *, counted: bool = True) -> None:
        """Writes the members' perturbed weights to `out`, but for those that are there already."""
        if self.told[0] is not terms or self.told[1] is not self.eps:
            self.told = terms, self.eps, self._perturbation(terms)
        if self.ready:
            wanted = self._ready(terms)
            pairs = [
                (m, t) for m, t in zip(members, out, strict=True) if self.ready.pop(id(m.param), None) != wanted(m, t)
            ]
            members, out = [m for m, _ in pairs], [t for _, t in pairs]
        self.passes.run(members, self.told[2], out=out, counted=counted)
        torch.clear_autocast_cache()  # of casts of what the copies held before

    def _perturbation(self, terms: Terms) -> Numbers:
        seeds = list(terms)
        return Numbers(seeds, {"A": perturbation(self.eps, terms, seeds)}, rule=self.rule)

    def _ready(self, terms: Terms) -> Callable[[Member, Tensor], Ready]:
        """What makes a member's copy the perturbation by these terms."""
        eps: list[float] = self.eps.tolist()

        def of(member: Member, copy: Tensor) -> Ready:
            versions = tuple(t._version for t in (member.param, *member.states.values()) if not t.is_inference())
            return Ready(copy.data_ptr(), versions, eps[member.group], dict(terms))

        return of

    def arrange(self, members: Sequence[Member]) -> Mapping[int, Tensor]:
        """Makes the copies of a step with these members, and says which can be filled before it, by parameter's id."""
        raise NotImplementedError

    def update(
        self,
        update: Update,
        ok: Tensor,
        *,
        rounding_seeds: tuple[int, int] | Tensor | None,
        stochastic: bool,
        ahead: Ahead | None = None,
    ) -> None:
        coefs = dict(update.coefs)
        if update.rule == "axpy":  # adding 0*z would turn -0.0 into +0.0: a pass that moves nothing writes nothing
            read = coefs["A"].to(torch.float32), update.shared["decay"].to(torch.float32)
            ok = ok & ((read[0] != 0).any() | (read[1] != 1).any())
        elif update.rule != "hizoo":
            coefs["A"] = torch.zeros_like(coefs["G"])
        numbers = Numbers(
            update.seeds,
            coefs,
            update.shared,
            update.rule,
            rounding_seeds,
            stochastic,
            update.square_of_sum,
            update.keep_second,
        )
        enabled = ok.reshape(1).to(torch.int32)
        if ahead is None or len(update.seeds) + len(ahead.terms) > MAX_CHAIN_SEEDS:
            self.passes.run(self.members, numbers, enabled=enabled)
        else:
            self._update_and_perturb(numbers, enabled, ahead)
        torch.clear_autocast_cache()

    def _update_and_perturb(self, numbers: Numbers, enabled: Tensor, ahead: Ahead) -> None:
        copies = self.arrange(ahead.members)
        probes = [copies.get(id(m.param)) for m in self.members]
        self.ready = {}
        stages = [numbers, self._perturbation(ahead.terms)]
        self.passes.chain(self.members, stages, numbers.rule, probes=probes, enabled=enabled)
        made = self._ready(ahead.terms)
        self.ready = {
            id(m.param): made(m, probe) for m, probe in zip(self.members, probes, strict=True) if probe is not None
        }


class Shadow(Exact):
    def __init__(self, module: nn.Module, passes: Passes) -> None:
        super().__init__(module, passes)
        sites.refuse_unswappable(module, "shadow")
        self.pools: sites.Pools = {}
        self.copies: list[nn.Parameter] = []
        self.layout: object = None
        self.tree: object = None
        self.sites: list[sites.Site] = []  # in that tree
        self.pairs: list[tuple[sites.Site, nn.Parameter]] = []  # each with its copy
        self.presented = False
        self.hooks: list[RemovableHandle] = []  # only during a step: a module that keeps them cannot be pickled

    def begin(self, members: Sequence[Member], eps: Tensor, *, scaled: bool) -> None:
        self.members, self.eps = members, eps
        self.rule = "scaled_axpy" if scaled else "axpy"
        copy_of = self._lay_out(members)
        tree = sites.fingerprint(self.module), self.layout
        if tree != self.tree:
            self.sites, self.tree = sites.find(self.module, members, "shadow"), tree
        self.pairs = [(site, copy_of[id(site.param)]) for site in self.sites]
        self.hooks = [
            self.module.register_state_dict_pre_hook(lambda *_: self._around_state_dict(copies=False)),
            self.module.register_state_dict_post_hook(lambda *_: self._around_state_dict(copies=True)),
        ]

    def _lay_out(self, members: Sequence[Member]) -> dict[int, nn.Parameter]:
        """Each member's copy, by the parameter's id."""
        layout = tuple((id(m.param), m.param.shape, m.param.dtype, m.param.device) for m in members)
        if layout != self.layout:
            self.copies, self.ready = [], {}  # views of the pools, which may be replaced
            self.passes.forget()
            sites.fit(self.pools, sites.sizes(members))
            self.copies = sites.copies(members, self.pools)
            self.layout = layout
        return {id(m.param): copy for m, copy in zip(members, self.copies, strict=True)}

    def arrange(self, members: Sequence[Member]) -> Mapping[int, Tensor]:
        self.pairs = []
        return {p: copy.detach() for p, copy in self._lay_out(members).items()}

    def memory(self) -> list[Tensor]:
        return list(self.pools.values())

    @contextlib.contextmanager
    def present(self, terms: Terms) -> Iterator[None]:
        if not terms:
            yield
            return
        self.perturb(self.members, terms, self.copies)
        try:
            self._show(copies=True)
            self.saving = False
            yield
            self.check_saved()
        finally:
            self._show(copies=False)

    def end(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.members, self.pairs, self.hooks = (), [], []

    def _show(self, *, copies: bool) -> None:
        self._enter(copies)
        self.presented = copies

    def _enter(self, copies: bool) -> None:
        for site, copy in self.pairs:
            site.show(copy if copies else site.param)

    def _around_state_dict(self, *, copies: bool) -> None:
        """A state_dict() asked for while the copies are shown is of the weights."""
        self.saving = not copies
        if self.presented:
            self._enter(copies)
