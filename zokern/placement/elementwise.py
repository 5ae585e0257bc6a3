"""Norms, sums, parts and transposes, with stand-ins that have another value in each block of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zokern.placement.blocks import BlockMatrix, Blocks, PerBlock, flagged, handles, name_of, split
from zokern.placement.rows import NotInBlocks, Rows

# ------------------------------------------------------------------------------------------------- norms, sums, products


def _aligned(t: Any, rows: Rows, use: tuple[str, str, int], dims: int) -> tuple[Any, bool]:
    """t as what broadcasts to [N, ...] of `dims` further dimensions; whether it is rows."""
    if isinstance(t, PerBlock):
        missing = dims - t.dim()
        return (t.each if not missing else t.each.reshape(rows.count, *[1] * missing, *t.shape)), False
    if isinstance(t, Tensor) and rows.are(t, use):
        if t.dim() < dims:
            raise NotInBlocks(f"{use[1]} of {use[0]} moves the rows of a batch to another dimension")
        return split(t, rows.count), True
    return t, False


@handles(
    torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__,
    torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.div, Tensor.div, Tensor.__truediv__, Tensor.__rtruediv__,
    torch.pow, Tensor.pow, Tensor.__pow__, torch.maximum, torch.minimum, torch.where, torch.addcmul,
)  # fmt: skip
def elementwise(func: Any, *given: Any, **named: Any) -> Any:
    """Each number of the result is of one number of each operand, which broadcast."""
    one = next((t for t in given if isinstance(t, PerBlock)), None)
    every = (*given, *named.values())
    if (
        one is None
        or any(isinstance(t, BlockMatrix) for t in every)
        or any(isinstance(t, Tensor) for t in named.values())
    ):
        return NotImplemented
    rows, name = flagged(*given), name_of(func)
    dims = max(t.dim() for t in given if isinstance(t, Tensor))
    operands = [_aligned(t, rows, (one.parameter, name, i), dims) for i, t in enumerate(given)]
    out = func(*(t for t, _ in operands), **named)
    return out.flatten(0, 1) if any(are_rows for _, are_rows in operands) else PerBlock(out, rows, one.parameter)


@handles(
    Tensor.add_,
    Tensor.sub_,
    Tensor.mul_,
    Tensor.div_,
    Tensor.__iadd__,
    Tensor.__isub__,
    Tensor.__imul__,
    Tensor.__itruediv__,
)
def elementwise_in_place(func: Any, a: Any, b: Any, **named: Any) -> Any:
    if isinstance(a, Blocks) or isinstance(b, BlockMatrix):
        return NotImplemented
    rows, name = flagged(b), name_of(func)
    x, are_rows = _aligned(a, rows, (b.parameter, name, 0), max(a.dim(), b.dim()))
    if not are_rows:
        return NotImplemented
    func(x, _aligned(b, rows, (b.parameter, name, 1), a.dim())[0], **named)
    return a


@handles(
    Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type, Tensor.contiguous, Tensor.clone,
    Tensor.detach, torch.neg, Tensor.neg, Tensor.__neg__, torch.exp, Tensor.exp, torch.sigmoid, Tensor.sigmoid, torch.tanh,
    Tensor.tanh, torch.square, Tensor.square, torch.abs, Tensor.abs, torch.rsqrt, Tensor.rsqrt, functional.softplus,
    functional.silu, functional.gelu, functional.relu, torch.relu, Tensor.relu, Tensor.cpu, Tensor.cuda, torch.clone,
    torch.detach,
)  # fmt: skip
def one_by_one(func: Any, one: Any, *others: Any, **named: Any) -> Any:
    """Each element for itself."""
    if isinstance(one, BlockMatrix):
        return _as_it_is(func, one, others, named)
    if not isinstance(one, PerBlock) or any(isinstance(t, Tensor) for t in (*others, *named.values())):
        return NotImplemented
    return PerBlock(func(one.each, *others, **named), flagged(one), one.parameter)


def _as_it_is(func: Any, one: BlockMatrix, others: Any, named: Any) -> Any:
    """A cast to what it is already."""
    if func in (Tensor.detach, torch.detach, Tensor.contiguous) and one.base.is_contiguous():
        return one
    if func in (Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.cpu):
        plain = [t.base if isinstance(t, BlockMatrix) else t for t in others]
        if not any(isinstance(t, Blocks) for t in plain) and func(one.base, *plain, **named) is one.base:
            return one
    return NotImplemented


def _scaled(x: Any, weight: Any, bias: Any, use: str) -> Any:
    """x weight + bias, of what a norm has made of rows."""
    one = weight if isinstance(weight, PerBlock) else bias
    rows = flagged(one)
    each, are_rows = _aligned(x, rows, (one.parameter, use, 0), x.dim())
    if not are_rows:
        each = each.unsqueeze(0)
    scale, shift = (
        None if t is None else _aligned(t, rows, (one.parameter, use, 1), x.dim())[0] for t in (weight, bias)
    )
    if scale is None:
        out = each + shift
    else:
        out = each * scale if shift is None else torch.addcmul(shift, each, scale)
    return out.flatten(0, 1) if are_rows else PerBlock(out, rows, one.parameter)


@handles(functional.layer_norm)
def layer_norm(func: Any, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    if isinstance(x, Blocks):
        return NotImplemented
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    out = _scaled(functional.layer_norm(wide, shape, None, None, eps), weight, bias, "layer_norm")
    return out if torch.is_autocast_enabled(x.device.type) else out.to(x.dtype)


@handles(functional.rms_norm)
def rms_norm(func: Any, x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    if isinstance(x, Blocks):
        return NotImplemented
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    out = _scaled(functional.rms_norm(wide, shape, None, eps), weight, None, "rms_norm")
    return out if torch.is_autocast_enabled(x.device.type) else out.to(x.dtype)


# ------------------------------------------------------------------------------------------------- parts and transposes


def _derived(one: BlockMatrix, base: Tensor, left: Tensor, right: Tensor) -> BlockMatrix:
    part = BlockMatrix(base, one.rows, one.parameter)
    part.left, part.right, part.scale = left, right, one.scale
    return part


@handles(Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
def turned(func: Any, one: Any) -> Any:
    if isinstance(one, BlockMatrix):
        return _derived(one, one.base.mT, one.right, one.left) if one.dim() == 2 else NotImplemented
    return PerBlock(one.each.mT, one.rows, one.parameter) if one.dim() == 2 else NotImplemented


@handles(Tensor.transpose, torch.transpose)
def transpose(func: Any, one: Any, dim0: Any, dim1: Any) -> Any:
    if isinstance(one, PerBlock):
        return PerBlock(one.each.transpose(dim0 % one.dim() + 1, dim1 % one.dim() + 1), one.rows, one.parameter)
    if one.dim() == 2 and {dim0 % 2, dim1 % 2} == {0, 1}:
        return _derived(one, one.base.mT, one.right, one.left)
    return NotImplemented


@handles(Tensor.permute, torch.permute)
def permute(func: Any, one: Any, *dims: Any) -> Any:
    if not isinstance(one, PerBlock):
        return NotImplemented
    order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return PerBlock(one.each.permute(0, *(dim % one.dim() + 1 for dim in order)), one.rows, one.parameter)


@handles(Tensor.unsqueeze, torch.unsqueeze)
def unsqueeze(func: Any, one: Any, dim: Any) -> Any:
    if not isinstance(one, PerBlock):
        return NotImplemented
    return PerBlock(one.each.unsqueeze(dim + 1 if dim >= 0 else dim), one.rows, one.parameter)


@handles(Tensor.expand)
def expand(func: Any, one: Any, *sizes: Any) -> Any:
    """Also to the batch: then each block's rows get its own."""
    if not isinstance(one, PerBlock):
        return NotImplemented
    wanted = list(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)
    own = [*[1] * (len(wanted) - one.dim()), *one.shape]
    wanted = [size if new == -1 else new for size, new in zip(own, wanted, strict=True)]
    rows, each = one.rows, one.each.reshape(one.rows.count, *own)
    if wanted and own[0] == 1 and rows.have(wanted, (one.parameter, "expand", 0)):
        return each.expand(-1, wanted[0] // rows.count, *wanted[1:]).flatten(0, 1)
    return PerBlock(each.expand(-1, *wanted), rows, one.parameter)


@handles(Tensor.__getitem__)
def getitem(func: Any, one: Any, index: Any) -> Any:
    """Rows of a matrix, which are one again; any part of what is kept for each block."""
    if isinstance(one, BlockMatrix):
        if one.dim() != 2 or not isinstance(index, slice):
            return NotImplemented
        return _derived(one, one.base[index], one.left[:, :, index], one.right)
    parts = index if isinstance(index, tuple) else (index,)
    if not isinstance(one, PerBlock) or any(isinstance(part, Tensor | list) for part in parts):
        return NotImplemented
    at = (slice(None), *parts)
    return PerBlock(one.each[at], one.rows, one.parameter)
