"""Forwards see a perturbed copy of the active parameters; the weights' own storage is written by updates alone.

The copy is one allocation for each device and dtype, which serves every step that needs no more than it has: LeZO's
active layers change from step to step, and their copies share it. While a closure runs, the module's entries for the
active parameters are the copies; before and after, and in a state_dict() of the module asked for from inside the
closure, they are the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zokern.optim.update import Update
from zokern.passes import Member, Passes, Terms, perturbation
from zokern.placement import sites


class Exact:
    """What placements share that leave the weights alone: the update works on clean weights."""

    def __init__(self, module: nn.Module, passes: Passes) -> None:
        self.module = module
        self.passes = passes
        self.members: Sequence[Member] = ()
        self.eps = torch.empty(0)
        self.rule = "axpy"
        self.saving = False  # a state_dict() asked for inside the closure is under way

    def check_saved(self) -> None:
        if self.saving:
            raise RuntimeError(
                "a state_dict() asked for inside the closure failed, and the closure went on with unperturbed weights"
            )

    def perturb(self, members: Sequence[Member], terms: Terms, out: Sequence[Tensor], *, counted: bool = True) -> None:
        """Writes the members' perturbed weights to `out`."""
        seeds = list(terms)
        coefs = perturbation(self.eps, terms, seeds)
        where = [t.detach() for t in out]
        self.passes.run(members, seeds, {"A": coefs}, rule=self.rule, out=where, counted=counted)
        torch.clear_autocast_cache()  # of casts of what the copies held before

    def update(self, update: Update, ok: Tensor, *, rounding_seeds: tuple[int, int] | None, stochastic: bool) -> None:
        coefs = dict(update.coefs)
        if update.rule == "axpy":  # adding 0*z would turn -0.0 into +0.0: a pass that moves nothing writes nothing
            read = coefs["A"].to(torch.float32), update.shared["decay"].to(torch.float32)
            ok = ok & ((read[0] != 0).any() | (read[1] != 1).any())
        elif update.rule != "hizoo":
            coefs["A"] = torch.zeros_like(coefs["G"])
        self.passes.run(
            self.members,
            update.seeds,
            coefs,
            update.shared,
            rule=update.rule,
            rounding_seeds=rounding_seeds,
            stochastic=stochastic,
            enabled=ok.reshape(1).to(torch.int32),
            square_of_sum=update.square_of_sum,
            keep_second=update.keep_second,
        )
        torch.clear_autocast_cache()


class Shadow(Exact):
    def __init__(self, module: nn.Module, passes: Passes) -> None:
        super().__init__(module, passes)
        sites.refuse_unswappable(module, "shadow")
        self.pools: sites.Pools = {}
        self.copies: list[nn.Parameter] = []
        self.layout: object = None
        self.pairs: list[tuple[sites.Site, nn.Parameter]] = []  # each with its copy
        self.presented = False
        self.hooks: list[RemovableHandle] = []  # only during a step: a module that keeps them cannot be pickled

    def begin(self, members: Sequence[Member], eps: Tensor, *, scaled: bool) -> None:
        self.members, self.eps = members, eps
        self.rule = "scaled_axpy" if scaled else "axpy"
        found = sites.find(self.module, members, "shadow")
        layout = tuple((id(m.param), m.param.shape, m.param.dtype, m.param.device) for m in members)
        if layout != self.layout:
            self.copies = []  # views of the pools, which may be replaced
            sites.fit(self.pools, sites.sizes(members))
            self.copies = sites.copies(members, self.pools)
            self.layout = layout
        copy_of = {id(m.param): copy for m, copy in zip(members, self.copies, strict=True)}
        self.pairs = [(site, copy_of[id(site.param)]) for site in found]
        self.hooks = [
            self.module.register_state_dict_pre_hook(lambda *_: self._around_state_dict(copies=False)),
            self.module.register_state_dict_post_hook(lambda *_: self._around_state_dict(copies=True)),
        ]

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
