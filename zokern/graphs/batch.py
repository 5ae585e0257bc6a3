"""A batch as nested containers of tensors: kept on the device at fixed places, and filled anew for each launch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def kind_of(value: Any, name: str) -> Any:
    """What of a batch is a part of the graph, to be compared with ==: containers, shapes and dtypes of tensors, and all
    other values.

    Raises:
        TypeError: for an array of NumPy, which is neither.
    """
    if isinstance(value, Mapping):
        return type(value), [(key, kind_of(part, f"{name}[{key!r}]")) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [kind_of(part, f"{name}[{i}]") for i, part in enumerate(value)]
    if isinstance(value, np.ndarray):
        raise TypeError(
            f"{name} is an array of NumPy, which is no part of a graph; make a tensor of it (torch.from_numpy)"
        )
    return (Tensor, tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def on_device(value: Any, device: torch.device, name: str) -> Any:
    """The same containers with copies of the tensors on `device`.

    Raises:
        ValueError: for a batch without tensors.
    """
    if not any(isinstance(leaf, Tensor) for leaf in _leaves(value)):
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


def _leaves(value: Any) -> Iterator[Any]:
    """Each value that is no container."""
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def copy_into(static: Any, batch: Any) -> None:
    """Fills the tensors of a captured batch with those of one of its kind."""
    for old, new in zip(_leaves(static), _leaves(batch), strict=True):
        if isinstance(old, Tensor):
            old.copy_(new, non_blocking=True)
