"""A batch as nested containers of tensors: kept on the device at fixed places, and filled anew for each launch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def given(batch: Any, batches: Iterable[Any] | None) -> tuple[list[Any], list[str], bool]:
    """The batches of a step, what messages call them, and whether they are micro-batches.

    Raises:
        TypeError, ValueError: for none of the two arguments or both of them, and for no micro-batch at all.
    """
    if (batch is None) == (batches is None):
        raise TypeError("give a step either batch or batches=[...]")
    if batches is None:
        return [batch], ["batch"], False
    every = list(batches)
    if not every:
        raise ValueError("batches is empty; leave the step out, or give what the closure is to be called with")
    return every, [f"batches[{i}]" for i in range(len(every))], True


def kind_of(value: Any, name: str) -> Any:
    """What of a batch is a part of the graph, to be compared with ==: containers, shapes, dtypes and strides of tensors,
    and all other values with their types (1 == True, and a closure may tell them apart).

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
    if isinstance(value, Tensor):
        return Tensor, tuple(value.shape), value.dtype, _strides(value)
    return type(value), value


def _strides(t: Tensor) -> tuple[int, ...] | None:
    """Those of a copy of it, None for the usual ones. Kernels differ by them (channels_last), and so may bits."""
    if t.layout is not torch.strided or t.is_contiguous():
        return None
    copied = torch.empty_like(t, device="meta")  # a part of a larger tensor gets the usual ones
    return None if copied.is_contiguous() else copied.stride()


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
