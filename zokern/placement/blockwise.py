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

from zokern.deltas import is_nothing
from zokern.placement.blocks import BlockMatrix, Blocks, PerBlock, flagged, handles
from zokern.placement.rows import NotInBlocks, Rows
from zokern.placement.thin import coefficients, spread

# ------------------------------------------------------------------------------------------------------------- products


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
    if type(weight.base) is Tensor and is_nothing(weight.base):
        with torch.autocast(x.device.type, enabled=False):
            thin = coefficients(_all(given.each, rows), into, weight.scale.unsqueeze(1))
            return given.back(spread(thin, out_of, start), weight.parameter)
    base = weight.base if turned else weight.base.t()
    if torch.is_autocast_enabled(x.device.type):
        rows.half = True
        leaf = weight.base if weight.leaf is None else weight.leaf
        out = torch.matmul(given.flat, leaf if turned else leaf.t())
        with torch.autocast(out.device.type, enabled=False):
            thin = spread(
                coefficients(_all(given.each, rows), into, weight.scale.unsqueeze(1)), out_of.to(out.dtype), None
            )
            thin += out.view(len(given.each), -1, out.shape[-1])
            return given.back(thin if start is None else thin.add_(start.to(out.dtype)), weight.parameter)
    thin = spread(coefficients(_all(given.each, rows), into, weight.scale.unsqueeze(1)), out_of, start)
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
            out = spread(p * weight.scale.unsqueeze(1), weight.right.float(), start.expand(rows.count, -1, -1))
            out = out.to(plain.dtype)
    if are_rows:
        return out.view(*ids.shape, -1)
    return PerBlock(out.reshape(rows.count, *ids.shape, out.shape[-1]), rows, weight.parameter)
