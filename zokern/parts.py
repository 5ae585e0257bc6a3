"""Where a rank's part of a DTensor lies in the whole tensor: FSDP2, tensor parallel, and both on one mesh.

A pass needs to know of a part the global index of its first element and, where its rows do not follow each other there, the
distance from one to the next. So a part can be one block of consecutive indices, or rows of a matrix cut along its last
dimension. Everything else is refused by name.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

Span = tuple[int, int]  # along a dimension: first index and number of indices


class Part(NamedTuple):
    """local: this rank's elements. offset, stride, shape: as a Member has them; shape () where local is the whole."""

    local: Tensor
    offset: int = 0
    stride: int = 0
    shape: tuple[int, ...] = ()


def is_dtensor(t: Any) -> bool:
    return type(t).__name__ == "DTensor"  # also a Parameter; torch.distributed need not be imported


def local(t: Any) -> Tensor:
    """This rank's elements of a DTensor; any other tensor itself. The same object each time."""
    mine: Tensor = t._local_tensor if is_dtensor(t) else t
    return mine


def whole(t: Any) -> Tensor:
    """All elements of a DTensor, whose ranks have to ask together; any other tensor itself."""
    every: Tensor = t.full_tensor() if is_dtensor(t) else t
    return every


def part(p: Tensor, name: str) -> Part:
    """This rank's part of a parameter. A tensor that is no DTensor is its own.

    Raises:
        ValueError: for a placement that no pass can go over, naming the tensor and the remedy.
    """
    mine = local(p)
    if mine is p:
        return Part(p)
    given = spans(p, name)
    _refuse_scattered(p, name)
    if tuple(mine.shape) != tuple(length for _, length in given):
        raise _refusal(
            p,
            name,
            f"this rank holds {tuple(mine.shape)} of it, where {tuple(length for _, length in given)} is its part",
        )
    shape = tuple(p.shape)
    if tuple(mine.shape) == shape:
        return Part(mine)
    if mine.numel() == 0:
        return Part(mine, 0, 0, shape)
    steps = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    offset = sum(first * step for (first, _), step in zip(given, steps, strict=True))
    stride = shape[-1] if len(shape) > 1 and given[-1][1] != shape[-1] else 0
    return Part(mine, offset, stride, shape)


def _refuse_scattered(p: Any, name: str) -> None:
    """Looks at the first rank's part, which is the largest, so that all ranks raise or none."""
    lengths = [length for _, length in spans(p, name, first=True)]
    last = len(lengths) - 1
    cuts = [d for d, (n, size) in enumerate(zip(lengths, p.shape, strict=True)) if n != size and not 0 < d == last]
    if cuts and math.prod(lengths[: cuts[-1]]) > 1:
        raise _refusal(
            p, name,
            f"it is cut along dimension {cuts[-1]}, so that a rank's part is neither one block nor rows that lie equally "
            "far apart; shard it along its first or its last dimension"
        )  # fmt: skip


def spans(p: Any, name: str, *, first: bool = False) -> list[Span]:
    """The first index and the number of indices of this rank's part, along each dimension. first: of the mesh's first rank.

    Raises:
        ValueError: for a placement that is neither a shard nor a replica.
    """
    coordinate = p.device_mesh.get_coordinate()
    if coordinate is None:
        raise _refusal(p, name, "this rank is not in its mesh: leave it out of the optimizer here")
    if first:
        coordinate = [0] * len(coordinate)
    found: list[Span] = [(0, size) for size in p.shape]
    for i in _order(p, name):
        dim, count = p.placements[i].dim % p.dim(), p.device_mesh.size(i)
        start, length = found[dim]
        each = -(-length // count)  # as torch.chunk cuts
        begin = min(each * coordinate[i], length)
        found[dim] = start + begin, min(each, length - begin)
    return found


def _order(p: Any, name: str) -> list[int]:
    """The mesh dimensions that cut a tensor, in the order in which they do: from the left, but for FSDP2's over tensor
    parallel's of the same dimension, which say how many cuts there were before."""
    cuts: list[int] = []
    for i, placement in enumerate(p.placements):
        kind = type(placement).__name__
        if kind not in ("Shard", "_StridedShard", "Replicate"):
            raise _refusal(p, name, f"{kind} has no elements of its own; redistribute it to Shard or Replicate")
        if kind != "Replicate":
            cuts.append(i)
    strided = [i for i in cuts if type(p.placements[i]).__name__ == "_StridedShard"]
    for i in reversed(strided):
        after = [j for j in cuts if j > i and p.placements[j].dim == p.placements[i].dim]
        before = math.prod(p.device_mesh.size(j) for j in after)
        if before != p.placements[i].split_factor:
            raise _refusal(
                p,
                name,
                "its shards are strided otherwise than FSDP2 does over tensor parallel; redistribute it to Shard",
            )
        cuts.remove(i)
        cuts.insert(cuts.index(after[-1]) + 1, i) if after else cuts.append(i)
    return cuts


def _refusal(p: Any, name: str, why: str) -> ValueError:
    return ValueError(f"{name} is a DTensor of {tuple(p.shape)} with {p.placements}, and no pass can go over it: {why}")
