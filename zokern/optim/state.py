"""What an optimizer keeps for each parameter, and the checks of a saved state before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

FORMAT = 2
Spec = dict[str, tuple[torch.dtype, float]]  # name -> dtype and initial value


def of(every: Mapping[Tensor, dict[str, Any]], param: Tensor, spec: Spec) -> dict[str, Tensor]:
    """The states of a parameter, made when it is first active: shaped like it, so that they shard as it does."""
    if not spec:
        return {}
    own = every[param]
    for name, (dtype, initial) in spec.items():
        if name not in own:
            own[name] = torch.full(param.shape, initial, dtype=dtype, device=param.device)
    return {name: own[name] for name in spec}


def unwrapped(name: str) -> str:
    """A parameter's name without what torch.compile's and DDP's wrappers put before it."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module"))


def check(
    own: dict[str, Any] | None,
    method: str,
    options: Mapping[str, Any],
    names: Sequence[Sequence[str]],
    has_module: bool,
    completed: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> None:
    """Raises ValueError where the "zokern" entry of a state_dict does not fit this optimizer. completed: options of an
    earlier version, with those that came later."""
    if own is None:
        raise ValueError("state_dict has no 'zokern' entry: it was not saved by a zokern optimizer")
    if own.get("format") != FORMAT or own.get("contract") != "zk1":
        raise ValueError(
            f"state_dict has format {own.get('format')} and noise contract {own.get('contract')!r}; this version reads "
            f"format {FORMAT} and contract 'zk1'"
        )
    if own["method"] != method:
        raise ValueError(f"state_dict is of {own['method']}, and this is {method}")
    saved = completed(own["options"])
    for name, value in options.items():
        if saved.get(name) != value:
            raise ValueError(f"{name} is {saved.get(name)!r} in state_dict and {value!r} here; make them agree")
    shapes = [len(ids) for ids in own["tensor_ids"]]
    if shapes != [len(group) for group in names]:
        raise ValueError(
            f"state_dict has groups of {shapes} parameters, this optimizer of {[len(group) for group in names]}"
        )
    if own["module"] and has_module:
        for theirs, ours in zip(chain(*own["names"]), chain(*names), strict=True):
            if theirs != ours and unwrapped(theirs) != unwrapped(ours):
                raise ValueError(f"state_dict has parameter {theirs!r} where this module has {ours!r}")


def check_tensors(
    saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], spec: Spec
) -> dict[Tensor, dict[str, Any]]:
    """Copies of the saved states on their parameters' devices, after a look at their shapes and dtypes."""
    numbers = chain(*(group["params"] for group in saved["param_groups"]))
    params = chain(*(group["params"] for group in groups))
    kept: dict[Tensor, dict[str, Any]] = {}
    for number, p in zip(numbers, params, strict=True):
        values = saved["state"].get(number, {})
        for name, value in values.items():
            if name in spec and (value.shape != p.shape or value.dtype != spec[name][0]):
                raise ValueError(
                    f"state_dict: {name} of parameter {number} is {tuple(value.shape)} {value.dtype}; this optimizer's is "
                    f"{tuple(p.shape)} {spec[name][0]}"
                )
        if values:
            kept[p] = {
                name: value.to(p.device, copy=True) if isinstance(value, Tensor) else value
                for name, value in values.items()
            }
    return kept
