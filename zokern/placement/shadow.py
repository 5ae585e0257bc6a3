"""Forwards see a perturbed copy of the active parameters; the weights' own storage is written by updates alone.

The copy is one allocation for each device and dtype, which serves every step that needs no more than it has: LeZO's
active layers change from step to step, and their copies share it. While a closure runs, the module's entries for the
active parameters are the copies; before and after, and in a state_dict() of the module asked for from inside the
closure, they are the weights. No storage is ever exchanged (`param.data = ...`), so views, tied weights and optimizer
state keep their meaning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zokern.optim.update import Update
from zokern.passes import Member, Passes, Terms, multiples


class Shadow:
    def __init__(self, module: nn.Module, passes: Passes) -> None:
        self.module = module
        self.passes = passes
        self.members: Sequence[Member] = ()
        self.eps = torch.empty(0)
        self.rule = "axpy"
        self.pools: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.copies: list[nn.Parameter] = []
        self.layout: object = None
        self.sites: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []  # module, name, weight, copy
        self.presented = False
        self.hooks: list[RemovableHandle] = []  # only during a step: a module that keeps them cannot be pickled

    def begin(self, members: Sequence[Member], eps: Tensor, *, scaled: bool) -> None:
        self.members, self.eps = members, eps
        self.rule = "scaled_axpy" if scaled else "axpy"
        layout = tuple((id(m.param), m.param.shape, m.param.dtype, m.param.device) for m in members)
        if layout != self.layout:
            self.copies = []  # views of the pools, which may be replaced
            self.copies = _copies(members, self.pools)
            self.layout = layout
        copy_of = {id(m.param): copy for m, copy in zip(members, self.copies, strict=True)}
        self.sites = [
            (owner, name, param, copy_of[id(param)])
            for owner in self.module.modules()
            for name, param in owner._parameters.items()
            if param is not None and id(param) in copy_of
        ]
        seen = {id(param) for _, _, param, _ in self.sites}
        for member in members:
            if id(member.param) not in seen:
                raise RuntimeError(
                    f"parameter {member.name} is not in the module any more, so placement='shadow' cannot show its "
                    "perturbed copy; make a new optimizer after changing the module"
                )

        self.hooks = [
            self.module.register_state_dict_pre_hook(lambda *_: self._around_state_dict(copies=False)),
            self.module.register_state_dict_post_hook(lambda *_: self._around_state_dict(copies=True)),
        ]

    @contextlib.contextmanager
    def present(self, terms: Terms) -> Iterator[None]:
        if not terms:
            yield
            return
        seeds = list(terms)
        row = multiples(terms, seeds)
        coefs = self.eps.to(row.device, non_blocking=True)[:, None] * row
        self.passes.run(self.members, seeds, {"A": coefs}, rule=self.rule, out=[c.detach() for c in self.copies])
        try:
            self._show(copies=True)
            yield
        finally:
            self._show(copies=False)

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

    def end(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.members, self.sites, self.hooks = (), [], []

    def _show(self, *, copies: bool) -> None:
        self._enter(copies)
        self.presented = copies

    def _enter(self, copies: bool) -> None:
        for owner, name, param, copy in self.sites:
            shown = copy if copies else param
            if type(owner).__setattr__ is nn.Module.__setattr__:
                owner._parameters[name] = shown
            else:  # for example nn.LSTM, which keeps a flat list of its weights beside
                setattr(owner, name, shown)

    def _around_state_dict(self, *, copies: bool) -> None:
        """A state_dict() asked for while the copies are shown is of the weights."""
        if self.presented:
            self._enter(copies)


def _copies(members: Sequence[Member], pools: dict[tuple[torch.device, torch.dtype], Tensor]) -> list[nn.Parameter]:
    """Uninitialised parameters like the members', out of one pool per device and dtype, on 16-byte boundaries."""
    total: dict[tuple[torch.device, torch.dtype], int] = {}
    starts = []
    for m in members:
        key = (m.param.device, m.param.dtype)
        starts.append(total.get(key, 0))
        total[key] = starts[-1] + -(-m.param.numel() // 8) * 8
    for key, size in total.items():
        if key not in pools or pools[key].numel() < size:
            pools.pop(key, None)  # freed before the larger one is made
            pools[key] = torch.empty(size, dtype=key[1], device=key[0])
    for key in pools.keys() - total.keys():
        del pools[key]
    copies = []
    for m, start in zip(members, starts, strict=True):
        view = pools[m.param.device, m.param.dtype][start : start + m.param.numel()].view(m.param.shape)
        copy = nn.Parameter(view, requires_grad=m.param.requires_grad)
        copy.__dict__.update(m.param.__dict__)  # attributes that libraries hang on parameters
        copies.append(copy)
    return copies
