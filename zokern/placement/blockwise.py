"""What ordinary transformers do with stand-ins that have another value in each block of rows, for all blocks at once.

A product with W + scale_k left_k^T right_k in block k is the product of all rows with W, which is read once, and for each
block two thin products, done as batches: ((x_k right_k^T) scale_k) left_k. The thin part is made first, in float32 or
rounded once, and the large product is added to it as it is summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zokern.placement.blocks import BlockMatrix, Blocks, PerBlock, flagged, handles, name_of, split
from zokern.placement.rows import NotInBlocks, Rows

# ------------------------------------------------------------------------------------------------------------- products


def _coefficients(x: Tensor, into: Tensor, scale: Tensor) -> Tensor:
    """(x into^T) scale, [N, R, K], float32 but for bfloat16, whose sums are rounded once. x [N, R, i], into [N, K, i]."""
    if x.dtype == torch.bfloat16:
        return torch.bmm(x, into.to(torch.bfloat16).mT).float().mul_(scale.unsqueeze(1))
    return torch.bmm(x.float(), into.float().mT).mul_(scale.unsqueeze(1))


def _spread(p: Tensor, out_of: Tensor, start: Tensor | None) -> Tensor:
    """start + p out_of, [N, R, m], in the dtype of `out_of` [N, K, m]. start: what broadcasts to the result."""
    p = p.to(out_of.dtype)
    if out_of.shape[1] == 1:  # no product: each row is a multiple of one
        return p * out_of if start is None else torch.addcmul(start, p, out_of)
    return torch.bmm(p, out_of) if start is None else torch.baddbmm(start, p, out_of)


class _Input:
    """x [..., i] as [N, R, i], or [1, R, i] where all blocks share it; and how what comes of it gets x's shape back."""

    def __init__(self, x: Tensor, rows: Rows, use: tuple[str, str]) -> None:
        self.rows, self.shape, self.per_block = rows, x.shape[:-1], True
        if isinstance(x, PerBlock):
            self.flat = x.each.reshape(-1, x.shape[-1])
            self.each = self.flat.view(rows.count, -1, x.shape[-1])
            return
        if isinstance(x, Blocks):
            raise NotInBlocks(f"{use[0]} is multiplied with {x.parameter}")
        self.flat = x.reshape(-1, x.shape[-1])
        if x.dim() > 1 and rows.are(x, (*use, 0)):
            self.per_block = False
            self.each = self.flat.view(rows.count, -1, x.shape[-1])
        else:
            self.each = self.flat.unsqueeze(0)

    def back(self, out: Tensor, name: str) -> Any:
        """out [N, R, m], or flat."""
        if self.per_block:
            return PerBlock(out.reshape(self.rows.count, *self.shape, out.shape[-1]), self.rows, name)
        return out.view(*self.shape, out.shape[-1])


def _start(bias: Any, rows: Rows) -> Tensor | None:
    """A bias [m] as what broadcasts to [N, R, m]."""
    return bias.each.unsqueeze(1) if isinstance(bias, PerBlock) else bias


def _product(x: Tensor, weight: BlockMatrix, use: str, bias: Any, *, turned: bool) -> Any:
    """x W^T + bias, or x W where W has its sides turned."""
    rows = flagged(weight)
    into, out_of = (weight.left, weight.right) if turned else (weight.right, weight.left)
    given, start = _Input(x, rows, (weight.parameter, use)), _start(bias, rows)
    base = weight.base if turned else weight.base.t()
    if torch.is_autocast_enabled(x.device.type):
        rows.half = True
        leaf = weight.base if weight.leaf is None else weight.leaf
        out = torch.matmul(given.flat, leaf if turned else leaf.t())
        with torch.autocast(out.device.type, enabled=False):
            thin = _spread(_coefficients(_all(given.each, rows), into, weight.scale), out_of.to(out.dtype), None)
            thin += out.view(len(given.each), -1, out.shape[-1])
            return given.back(thin if start is None else thin.add_(start.to(out.dtype)), weight.parameter)
    thin = _spread(_coefficients(_all(given.each, rows), into, weight.scale), out_of, start)
    if type(base) is Tensor and len(given.each) == rows.count:
        return given.back(thin.view(-1, thin.shape[-1]).addmm_(given.flat, base), weight.parameter)
    return given.back(thin.add_((given.flat @ base).view(len(given.each), -1, thin.shape[-1])), weight.parameter)


def _all(each: Tensor, rows: Rows) -> Tensor:
    return each.expand(rows.count, -1, -1) if len(each) == 1 else each


def _dense(x: Tensor, weight: Any, name: str, use: str, bias: Any, *, turned: bool) -> Any:
    """With a weight [m, n] of which each block has another, or a plain one, and the bias is of blocks."""
    rows = flagged(weight if isinstance(weight, PerBlock) else bias)
    given, start = _Input(x, rows, (name, use)), _start(bias, rows)
    if isinstance(weight, PerBlock):
        each = weight.each if turned else weight.each.mT
        if torch.is_autocast_enabled(x.device.type):
            rows.half = True
            out = torch.bmm(_all(given.each, rows), each)
        elif start is None:
            return given.back(torch.bmm(_all(given.each, rows), each), name)
        else:
            return given.back(torch.baddbmm(start, _all(given.each, rows), each), name)
    else:
        out = torch.matmul(given.flat, weight if turned else weight.t()).view(len(given.each), -1, bias.shape[-1])
    return given.back(out if start is None else out + start.to(out.dtype), name)


@handles(functional.linear)
def linear(func: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(weight, BlockMatrix) and weight.dim() == 2:
        return _product(x, weight, "linear", bias, turned=False)
    if weight.dim() != 2 or not (isinstance(weight, PerBlock) or isinstance(bias, PerBlock)):
        return NotImplemented
    name = weight.parameter if isinstance(weight, PerBlock) else bias.parameter
    return _dense(x, weight, name, "linear", bias, turned=False)


@handles(torch.addmm, Tensor.addmm)
def addmm(func: Any, bias: Any, x: Any, weight: Any, **others: Any) -> Any:
    """As GPT-2's Conv1D calls it."""
    if others or isinstance(x, BlockMatrix):
        return NotImplemented
    if isinstance(weight, BlockMatrix):
        return _product(x, weight, "addmm", bias, turned=True)
    if not isinstance(weight, PerBlock) and (not isinstance(bias, PerBlock) or isinstance(x, PerBlock)):
        return NotImplemented
    name = weight.parameter if isinstance(weight, PerBlock) else bias.parameter
    return _dense(x, weight, name, "addmm", bias, turned=True)


@handles(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(func: Any, x: Any, weight: Any, **others: Any) -> Any:
    if others or isinstance(x, BlockMatrix) or weight.dim() != 2:
        return NotImplemented
    if isinstance(weight, BlockMatrix):
        return _product(x, weight, "matmul", None, turned=True)
    if isinstance(weight, PerBlock):
        return _dense(x, weight, weight.parameter, "matmul", None, turned=True)
    return NotImplemented


@handles(functional.embedding)
def embedding(
    func: Any, ids: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *a: Any, **more: Any
) -> Any:
    """padding_idx, scale_grad_by_freq and sparse are of gradients alone; max_norm writes to the weight."""
    if max_norm is not None or weight.dim() != 2 or isinstance(ids, Blocks):
        return NotImplemented
    rows = flagged(weight)
    are_rows = rows.are(ids, (weight.parameter, "embedding", 0))
    own = ids.reshape(rows.count, -1) if are_rows else ids.reshape(1, -1).expand(rows.count, -1)
    if isinstance(weight, PerBlock):
        out = weight.each[torch.arange(rows.count, device=ids.device).unsqueeze(1), own]
    else:
        plain = functional.embedding(ids, weight.base)
        p = weight.left.gather(2, own.unsqueeze(1).expand(-1, weight.left.shape[1], -1)).mT.float()
        with torch.autocast(plain.device.type, enabled=False):
            start = plain.reshape(rows.count if are_rows else 1, -1, plain.shape[-1]).float()
            out = _spread(p * weight.scale.unsqueeze(1), weight.right.float(), start.expand(rows.count, -1, -1))
            out = out.to(plain.dtype)
    if are_rows:
        return out.view(*ids.shape, -1)
    return PerBlock(out.reshape(rows.count, *ids.shape, out.shape[-1]), rows, weight.parameter)


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
    rows, name = flagged(one), name_of(func)
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
