"""A batch repeated N times along its first dimension, in blocks: rows 0 to B - 1, and again from row 0.

What is repeated are the tensors and arrays whose first dimension is the batch's, lists of as many texts or numbers, and
caches of transformers. Scalars, [1, T] and [1, 1, T, T], one-dimensional tensors of another length, and all that is no
tensor stay as they are: all rows share them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

PLAIN = (str, bytes, int, float, bool, type(None))


def size_of(batch: Any, which: str) -> int:
    """The rows of a batch, B. which: its name, for messages.

    Raises:
        ValueError: where its tensors have several, or none.
    """
    sizes: dict[int, dict[int, str]] = {1: {}, 2: {}}
    for path, leaf in _leaves(batch):
        dims = len(leaf.shape) if isinstance(leaf, Tensor | np.ndarray) else 1 if isinstance(leaf, list) else 0
        if dims:
            shape = tuple(leaf.shape) if not isinstance(leaf, list) else (len(leaf),)
            sizes[min(dims, 2)].setdefault(shape[0], f"{path or 'it'} {list(shape)}")
    found = sizes[2] or sizes[1]
    several = {size: where for size, where in found.items() if size != 1} or found
    if len(several) == 1:
        return next(iter(several))
    if not several:
        raise ValueError(
            f"{which} has no tensor with rows, so batched=True cannot repeat it for each direction; give the closure its "
            "examples through batches"
        )
    raise ValueError(
        f"{which} has tensors of several lengths ({', '.join(several.values())}), so batched=True does not know which rows "
        "to repeat; give what is not of the rows to the closure in another way, or leave batched out"
    )


def repeated(batch: Any, rows: int, count: int) -> Any:
    """The batch `count` times. A cache is another one each time, as forwards write to it."""

    def one(leaf: Any) -> Any:
        if count == 1 and not hasattr(leaf, "batch_select_indices"):
            return leaf
        if isinstance(leaf, Tensor):
            own = leaf.dim() > 0 and leaf.shape[0] == rows
            return leaf.repeat(count, *[1] * (leaf.dim() - 1)) if own else leaf
        if isinstance(leaf, np.ndarray):
            return np.concatenate([leaf] * count) if leaf.ndim and leaf.shape[0] == rows else leaf
        if isinstance(leaf, list):
            return leaf * count if len(leaf) == rows else leaf
        if hasattr(leaf, "batch_select_indices"):
            made = copy.deepcopy(leaf)
            made.batch_select_indices(torch.arange(rows).repeat(count))
            return made
        return leaf

    return _mapped(one, batch)


def _is_texts(given: Any) -> bool:
    return type(given) is list and len(given) > 0 and all(isinstance(entry, PLAIN) for entry in given)


def _fields(given: Any) -> dict[str, Any] | None:
    """Of what pytrees do not know."""
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        return {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    return dict(given) if isinstance(given, Mapping) else None


def _leaves(batch: Any, path: str = "") -> list[tuple[str, Any]]:
    found = []
    for own, leaf in pytree.tree_flatten_with_path(batch, is_leaf=_is_texts)[0]:
        name = path + pytree.keystr(own)
        inner = None if isinstance(leaf, list) else _fields(leaf)
        found += [(name, leaf)] if inner is None else _leaves(inner, name)
    return found


def _mapped(one: Any, batch: Any) -> Any:
    def each(leaf: Any) -> Any:
        inner = None if isinstance(leaf, list) else _fields(leaf)
        if inner is None:
            return one(leaf)
        changed = _mapped(one, inner)
        if dataclasses.is_dataclass(leaf):
            return dataclasses.replace(leaf, **changed)  # type: ignore[type-var]
        made = copy.copy(leaf)
        for name, value in changed.items():
            made[name] = value
        return made

    return pytree.tree_map(each, batch, is_leaf=_is_texts)


def kinds_of(batch: Any) -> tuple[object, ...]:
    """What a batch is like, but for its sizes."""
    return tuple(
        (path, leaf.dim(), leaf.dtype, leaf.shape[:1] == (1,)) if isinstance(leaf, Tensor) else (path, type(leaf))
        for path, leaf in _leaves(batch)
    )
