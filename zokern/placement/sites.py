"""Where a module keeps its parameters, and copies of them to show there while a closure runs.

No storage is ever exchanged (`param.data = ...`): a module's entry for a parameter is another Parameter for a while, so
views, tied weights and optimizer state keep their meaning.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zokern import parts
from zokern.sweep import Member

Pools = dict[tuple[torch.device, torch.dtype], Tensor]


@dataclass(frozen=True)
class Site:
    """A place that holds a parameter: a tied one has several."""

    owner: nn.Module
    name: str
    param: nn.Parameter

    @functools.cached_property
    def _plain(self) -> bool:
        return type(self.owner).__setattr__ is nn.Module.__setattr__

    def show(self, shown: nn.Parameter) -> None:
        if self._plain:
            self.owner._parameters[self.name] = shown
        else:  # for example nn.LSTM, which keeps a flat list of its weights beside
            setattr(self.owner, self.name, shown)


def needed(module: nn.Module | None, placement: str) -> nn.Module:
    if module is None:
        raise ValueError(
            f"placement={placement!r} has to show the perturbed weights to a module: pass the nn.Module, not its parameters"
        )
    return module


def refuse_unswappable(module: nn.Module, placement: str) -> None:
    """A module that keeps its weights where nothing can be shown in their place."""
    for name, child in module.named_modules():
        if isinstance(child, (torch.jit.ScriptModule, nn.DataParallel)):
            raise ValueError(
                f"placement={placement!r} cannot show perturbed weights to {name or 'the module'}, a "
                f"{type(child).__name__}; use placement='inplace', or the plain module"
            )


def find(module: nn.Module, members: Sequence[Member], placement: str) -> list[Site]:
    """All sites of the members' parameters.

    Raises:
        RuntimeError: naming a parameter that the module does not hold any more.
    """
    wanted = {id(m.held) for m in members}
    sites = [
        Site(owner, name, param)
        for owner in module.modules()
        for name, param in owner._parameters.items()
        if param is not None and id(param) in wanted
    ]
    seen = {id(site.param) for site in sites}
    for member in members:
        if id(member.held) not in seen:
            raise RuntimeError(
                f"parameter {member.name} is not in the module any more, so placement={placement!r} cannot show its "
                "perturbed copy; make a new optimizer after changing the module"
            )
    return sites


def fingerprint(module: nn.Module) -> list[tuple[object, ...]]:
    """Differs once a module or a parameter has been put in, taken out or replaced anywhere, or a module been compiled.

    Ids stand for objects: who compares must hold those that matter, so that no other one gets the id.
    """
    found, seen, pending = [], set(), [module]
    while pending:
        child = pending.pop()
        if id(child) not in seen:
            seen.add(id(child))
            params, modules = child._parameters, child._modules
            compiled = getattr(child, "_compiled_call_impl", None) is not None
            names = *params, *modules
            found.append((id(child), compiled, names, *map(id, params.values()), *map(id, modules.values())))
            pending += [c for c in modules.values() if c is not None]
    return found


def padded_size(p: Tensor) -> int:
    """Elements of a pool that a copy takes: to the next 16-byte boundary of 16-bit types."""
    return -(-p.numel() // 8) * 8


def sizes(members: Sequence[Member]) -> dict[tuple[torch.device, torch.dtype], int]:
    """Elements that copies of the members take, by device and dtype."""
    total: dict[tuple[torch.device, torch.dtype], int] = {}
    for m in members:
        key = (m.param.device, m.param.dtype)
        total[key] = total.get(key, 0) + padded_size(m.param)
    return total


def fit(pools: Pools, wanted: Mapping[tuple[torch.device, torch.dtype], int]) -> None:
    """Makes each pool hold what is wanted; one that is large enough is kept, one that nobody wants is freed."""
    for key in pools.keys() - wanted.keys():
        del pools[key]
    for key, size in wanted.items():
        if key not in pools or pools[key].numel() < size:
            pools.pop(key, None)  # freed before the larger one is made
            pools[key] = torch.empty(size, dtype=key[1], device=key[0])


def copies(members: Sequence[Member], pools: Pools) -> list[nn.Parameter]:
    """Uninitialised parameters like the members', in the pools from their beginning."""
    used: dict[tuple[torch.device, torch.dtype], int] = {}
    made = []
    for m in members:
        key = (m.param.device, m.param.dtype)
        start = used.get(key, 0)
        used[key] = start + padded_size(m.param)
        view = pools[key][start : start + m.param.numel()].view(m.param.shape)
        copy = nn.Parameter(_like(m.held, view), requires_grad=m.held.requires_grad)
        own = copy.__dict__.keys()  # a DTensor's are its memory and its placements
        copy.__dict__.update(
            {name: value for name, value in m.held.__dict__.items() if name not in own}
        )  # of libraries
        made.append(copy)
    return made


def _like(held: Any, view: Tensor) -> Tensor:
    """What a module can have in the place of a parameter, with this memory: of a DTensor a DTensor."""
    if not parts.is_dtensor(held):
        return view
    made: Tensor = type(held).from_local(
        view, held.device_mesh, held.placements, run_check=False, shape=held.shape, stride=held.stride()
    )
    return made
