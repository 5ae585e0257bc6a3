"""A batch as nested containers of tensors: kept on the device at fixed places, and filled anew for each launch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from zokern import _checks


def on_device(value: Any, device: torch.device, name: str) -> Any:
    """The same containers with copies of the tensors on `device`."""
    found = list(_leaves(value, name))
    if not any(isinstance(leaf, Tensor) for _, leaf in found):
        raise ValueError(f"{name} has no tensor in it, so every step would have the same batch")
    return _map(value, lambda leaf: leaf.detach().to(device, copy=True) if isinstance(leaf, Tensor) else leaf)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        made = copy.copy(value)
        for key in value:
            made[key] = _map(value[key], change)  # type: ignore[index]
        return made
    if isinstance(value, (list, tuple)):
        parts = [_map(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return change(value)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Each value that is no container, with its path for messages."""
    if isinstance(value, Mapping):
        for key in value:
            yield from _leaves(value[key], f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _leaves(part, f"{name}[{i}]")
    else:
        yield name, value


def copy_into(static: Any, batch: Any, name: str) -> None:
    """Fills the tensors of the captured batch; nothing is copied unless everything fits."""
    wanted, given = list(_leaves(static, name)), list(_leaves(batch, name))
    if [path for path, _ in wanted] != [path for path, _ in given]:
        raise ValueError(
            f"{name} has {', '.join(path for path, _ in given)}; captured was a batch with "
            f"{', '.join(path for path, _ in wanted)}"
        )
    for (path, old), (_, new) in zip(wanted, given, strict=True):
        if isinstance(old, Tensor):
            if not isinstance(new, Tensor) or new.shape != old.shape or new.dtype != old.dtype:
                raise ValueError(
                    f"{path} is {_checks.describe(new) if isinstance(new, Tensor) else repr(new)}; captured was "
                    f"{_checks.describe(old)}: pad the batch, or make a GraphedStep for each shape"
                )
        elif isinstance(new, Tensor) or new != old:
            raise ValueError(f"{path} is {new!r}, and {old!r} is part of the captured graph; it cannot change")
    for (_, old), (_, new) in zip(wanted, given, strict=True):
        if isinstance(old, Tensor):
            old.copy_(new, non_blocking=True)
