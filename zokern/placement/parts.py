"""Parts of a `PlusLowRank`, transposes and casts, which are stand-ins again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zokern.placement.plus import DTYPES, PLAIN, PlusLowRank, full, handles, is_open


def _derived(
    one: PlusLowRank, base: Tensor, left: Tensor, right: Tensor, again: Callable[[Tensor], Tensor], by: str
) -> PlusLowRank:
    """again: of the sum, what `base` is of the weight. by: the function. A view of the weight is a view of the sum too,
    once something has asked for that."""
    part = PlusLowRank(base, left, right, one.scale, one.parameter)
    part.decay, part.seen = one.decay, one.seen
    part.write = None if one.write is None else lambda: again(full(one, by))
    if base.untyped_storage().data_ptr() == one.base.untyped_storage().data_ptr():
        part.viewed = one
    return part


def _is_whole(one: Any) -> bool:
    """Whether it is one whose parts are stand-ins; where a compiler traces, they are parts of the sum."""
    return is_open(one) and not torch.compiler.is_compiling()


def _turned(one: PlusLowRank) -> Any:
    return (
        _derived(one, one.base.mT, one.right, one.left, lambda t: t.mT, "transpose")
        if _is_whole(one)
        else NotImplemented
    )


@handles(Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__, parts=True)  # type: ignore[attr-defined]
def turned(input: Any, *others: Any) -> Any:
    return _turned(input) if input.dim() == 2 else NotImplemented


@handles(
    Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes, Tensor.swapdims, torch.swapdims, parts=True
)
def transpose(input: Any, dim0: Any, dim1: Any) -> Any:
    if not (isinstance(dim0, int) and isinstance(dim1, int)):
        return NotImplemented
    dims = input.dim()
    return _turned(input) if {dim0 % dims, dim1 % dims} == {dims - 2, dims - 1} else NotImplemented


@handles(Tensor.permute, torch.permute, parts=True)
def permute(input: Any, *dims: Any) -> Any:
    order = dims[0] if len(dims) == 1 else dims
    turns = ((1, 0), (-1, -2), (0, 2, 1), (0, -1, -2))
    return _turned(input) if tuple(order) in turns and len(order) == input.dim() else NotImplemented


@handles(Tensor.detach, torch.detach, Tensor.data.__get__, parts=True)  # type: ignore[attr-defined]
def detach(input: Any, *others: Any) -> Any:
    if not _is_whole(input):
        return NotImplemented
    return _derived(input, input.base, input.left, input.right, lambda t: t.detach(), "detach")


def _cast(func: Any, *given: Any, **named: Any) -> Any:
    """To another dtype, or as it is; of something else to the dtype of a weight."""
    one = given[0]
    if type(one) is not PlusLowRank:
        like = [other.base if type(other) is PlusLowRank else other for other in given]
        return NotImplemented if named else func(*like)
    if not _is_whole(one) or any(type(other) is PlusLowRank for other in (*given[1:], *named.values())):
        return NotImplemented
    base = func(one.base, *given[1:], **named)
    if base is one.base or not isinstance(base, Tensor):
        return one if base is one.base else base
    if base.dtype not in DTYPES or (base.device, base.layout) != (one.base.device, torch.strided):
        return NotImplemented
    left, right = one.left.to(base.dtype), one.right.to(base.dtype)
    return _derived(one, base, left, right, lambda t: func(t, *given[1:], **named), func.__name__)


@handles(Tensor.__getitem__, parts=True)
def getitem(input: Any, index: Any) -> Any:
    """An expert, or some of them, of [E, m, n]; rows of a matrix."""
    one = input
    if type(one) is not PlusLowRank or not _is_whole(one):
        return NotImplemented
    whole = type(index) is int or (type(index) in PLAIN and not index.is_floating_point() and index.dtype != torch.bool)
    again, by = (lambda t: t[index]), "__getitem__"
    if one.base.dim() == 3 and (whole or isinstance(index, slice)):
        return _derived(one, one.base[index], one.left[:, index], one.right[:, index], again, by)
    if one.base.dim() == 2 and isinstance(index, slice):
        return _derived(one, one.base[index], one.left[:, index], one.right, again, by)
    return NotImplemented


def _pieces(func: Any, *given: Any, **named: Any) -> Any:
    """Of the rows of a matrix."""
    if len(given) not in (2, 3) or (*given[2:], *named.items()) not in ((), (0,), (("dim", 0),)):
        return NotImplemented
    one, size = given[:2]
    if not _is_whole(one) or one.base.dim() != 2:
        return NotImplemented
    bases, lefts = func(one.base, size, dim=0), func(one.left, size, dim=1)

    def piece(i: int) -> PlusLowRank:
        return _derived(one, bases[i], lefts[i], one.right, lambda t: func(t, size, dim=0)[i], func.__name__)

    return tuple(map(piece, range(len(bases))))


CASTS = Tensor.to, Tensor.float, Tensor.bfloat16, Tensor.half, Tensor.type, Tensor.type_as, Tensor.contiguous
CUTS = Tensor.chunk, torch.chunk, Tensor.split, torch.split
for handler, functions in ((_cast, CASTS), (_pieces, CUTS)):
    for function in functions:
        handles(function, parts=True)(functools.partial(handler, function))
