"""What an optimizer keeps for each parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zokern import parts

FORMAT = 2
WITH_PENDING = 3  # updates wait: who does not know of them must not go on without
Spec = dict[str, tuple[torch.dtype, float]]  # name -> dtype and initial value


def of(every: Mapping[Tensor, dict[str, Any]], param: Tensor, spec: Spec) -> dict[str, Tensor]:
    """The states of a parameter, made when it is first active: shaped like it, so that they shard as it does."""
    if not spec:
        return {}
    own = every[param]
    if not spec.keys() <= own.keys():  # all of them or none: some alone could not be saved and loaded again
        own.update(
            {name: full_like(param, initial, dtype) for name, (dtype, initial) in spec.items() if name not in own}
        )
    return {name: own[name] for name in spec}


def full_like(param: Tensor, initial: float, dtype: torch.dtype) -> Tensor:
    """Contiguous; of a DTensor a DTensor of the same mesh and placements."""
    if parts.is_dtensor(param):
        return torch.full_like(param.detach(), initial, dtype=dtype)
    return torch.full(param.shape, initial, dtype=dtype, device=param.device)


def untouched(every: Mapping[Tensor, dict[str, Any]], spec: Spec) -> bool:
    """Whether all states there, on this rank, still have their first values. Waits for the device."""
    return all(
        name in spec and bool((parts.local(value) == spec[name][1]).all())
        for own in every.values() for name, value in own.items()
    )  # fmt: skip


def unwrapped(name: str) -> str:
    """A parameter's name without what torch.compile's and DDP's wrappers put before it."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module"))
