"""What the ranks that share a tensor out find together, so that each does the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from zokern.parts import is_dtensor


def totals(tensors: Sequence[Tensor], numbers: Tensor) -> Tensor:
    """Sums over the parts of each tensor, [T, N], of what each rank has of its own part; the same bits on all ranks of a
    mesh. Every rank of the tensors' meshes has to call it at the same point.

    numbers: [T, N], a row for each tensor. A rank whose part another one has too counts as 0.
    """
    found = numbers.clone()
    together: dict[Any, list[int]] = {}
    for i, t in enumerate(tensors):
        if is_dtensor(t):
            together.setdefault(t.device_mesh, []).append(i)  # type: ignore[attr-defined]
    for mesh, at in together.items():
        own = found[at]
        coordinate = mesh.get_coordinate()
        for row, i in enumerate(at):
            copies = zip(coordinate, tensors[i].placements, strict=True)  # type: ignore[attr-defined]
            if any(where and placement.is_replicate() for where, placement in copies):
                own[row] = 0
        for dim in range(mesh.ndim):
            torch.distributed.all_reduce(own, group=mesh.get_group(dim))
        found[at] = own
    return found


def whole_look(tensors: Iterable[Tensor]) -> tuple[object, ...]:
    """What is the same of these tensors on every rank; () where none is a DTensor."""
    every = list(tensors)
    if not any(map(is_dtensor, every)):
        return ()
    return tuple((tuple(t.shape), t.dtype, getattr(t, "placements", ())) for t in every)
