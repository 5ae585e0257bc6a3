"""Products and lookups of a `PlusLowRank`: those of the weight, and two thin products for what is added to it.

With W = D base + sum_k scale[k] left[k]^T right[k], x W^T is D x base^T + ((x right^T) scale) left. The thin part is made
first, in float32 or rounded once, and the large product is added to it as it is summed: the output is rounded once. Under
autocast, whose product has rounded already, it is added behind; also in float32 along one direction of rank 1, which is
fewer operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zokern.deltas import is_nothing
from zokern.placement.plus import PLAIN, PlusLowRank, handles, is_open, kept, note_use


def is_plain(x: Any) -> bool:
    """Whether x has rows that can be taken together: sparse and nested tensors are multiplied by the sum."""
    return type(x) in PLAIN and x.layout is torch.strided and not x.is_nested


def coefficients(rows: Tensor, into: Tensor, scale: Tensor) -> Tensor:
    """(rows into^T) scale, [N, K], float32 but for bfloat16, whose sums are rounded once. into [K, n]: float16 is widened,
    as it may not hold the sums. All with one dimension more in front for a batch of them."""
    if rows.dtype == torch.bfloat16:
        return torch.matmul(rows, into.to(torch.bfloat16).mT).float().mul_(scale)
    if rows.dtype != into.dtype or rows.dtype != torch.float32:
        rows, into = rows.float(), into.float()
    return torch.matmul(rows, into.mT).mul_(scale)


def spread(p: Tensor, out_of: Tensor, start: Tensor | None) -> Tensor:
    """start + p out_of, [N, m], in the dtype of `out_of` [K, m]; or with one dimension more in front. start: what
    broadcasts to the result."""
    p = p if p.dtype == out_of.dtype else p.to(out_of.dtype)
    if out_of.shape[-2] == 1:  # no product: each row is a multiple of one
        return p * out_of if start is None else torch.addcmul(start, p, out_of)
    if start is None:
        return p @ out_of
    return torch.addmm(start, p, out_of) if out_of.dim() == 2 else torch.baddbmm(start, p, out_of)


def _behind(out: Tensor, rows: Tensor, into: Tensor, scale: Tensor, out_of: Tensor) -> Tensor:
    """out, which autocast has rounded, with the thin part added."""
    with torch.autocast(out.device.type, enabled=False):
        p = coefficients(rows, into, scale)
        flat = out.reshape(-1, out.shape[-1])
        return spread(p, out_of.to(out.dtype), flat).view(out.shape)


def _product(
    one: PlusLowRank, rows: Tensor, matrix: Tensor, into: Tensor, out_of: Tensor, bias: Tensor | None
) -> Tensor:
    """bias + D rows matrix + ((rows into^T) scale) out_of: rows [N, i], matrix [i, o], into [K, i], out_of [K, o]."""
    return spread(coefficients(rows, into, one.scale), out_of, bias).addmm_(kept(one, rows), matrix)


def _castable(weight: PlusLowRank) -> Tensor:
    return weight.base if weight.leaf is None or torch.compiler.is_compiling() else weight.leaf


def _alone(one: PlusLowRank, x: Tensor, into: Tensor, out_of: Tensor) -> Tensor:
    """The thin part, in the dtype of `out_of`, where there is no more (deltas.py)."""
    note_use(one)
    with torch.autocast(x.device.type, enabled=False):
        out = spread(coefficients(x.reshape(-1, x.shape[-1]), into, one.scale), out_of, None)
    return out.view(*x.shape[:-1], out.shape[-1])


@handles(functional.linear)
def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    x = input
    if not is_plain(x) or not is_open(weight) or weight.base.dim() != 2 or type(bias) is PlusLowRank:
        return NotImplemented
    if is_nothing(weight.base) and bias is None:
        return _alone(weight, x, weight.right, weight.left)
    casts = torch.is_autocast_enabled(x.device.type)
    if x.dtype == torch.float32 == weight.base.dtype and len(weight.left) == 1 and x.dim() > 1 and not casts:
        p = functional.linear(x, weight.right).mul_(weight.scale)
        return functional.linear(kept(weight, x), weight.base, bias).addcmul_(p, weight.left)
    rows = x.reshape(-1, x.shape[-1])
    if casts:
        out = functional.linear(kept(weight, x), _castable(weight), bias)
        return _behind(out, rows, weight.right, weight.scale, weight.left)
    out = _product(weight, rows, weight.base.t(), weight.right, weight.left, bias)
    return out.view(*x.shape[:-1], out.shape[-1])


@handles(torch.addmm, Tensor.addmm)
def addmm(input: Any, mat1: Any, mat2: Any, **others: Any) -> Any:
    """As GPT-2's Conv1D calls it."""
    bias, x, weight = input, mat1, mat2
    if others or not is_plain(x) or type(bias) is PlusLowRank or not is_open(weight):
        return NotImplemented
    if torch.is_autocast_enabled(x.device.type):
        return _behind(
            torch.addmm(bias, kept(weight, x), _castable(weight)), x, weight.left, weight.scale, weight.right
        )
    return _product(weight, x, weight.base, weight.left, weight.right, bias)


@handles(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def matmul(input: Any, other: Any, **others: Any) -> Any:
    if is_open(input) and input.base.dim() == 2 and not others and is_plain(other):
        return _from_left(input, other)
    if type(input) is PlusLowRank or other.dim() == 3:
        same = not others and input.dim() == 3 and other.dim() == 3 and input.shape[0] == other.shape[0]
        return bmm(input, other) if same else NotImplemented
    x, weight = input, other
    if others or not is_plain(x) or not is_open(weight) or weight.base.dim() != 2:
        return NotImplemented
    if is_nothing(weight.base):
        return _alone(weight, x, weight.left, weight.right)
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_autocast_enabled(x.device.type):
        return _behind(torch.matmul(kept(weight, x), _castable(weight)), rows, weight.left, weight.scale, weight.right)
    out = _product(weight, rows, weight.base, weight.left, weight.right, None)
    return out.view(*x.shape[:-1], out.shape[-1])


def _from_left(one: PlusLowRank, x: Tensor) -> Tensor:
    """W x, [.., m, N] of x [.., n, N], or of a vector [n]: as some models of states have it."""
    out = torch.matmul(one.base, kept(one, x))
    with torch.autocast(out.device.type, enabled=False):
        scale = one.scale if x.dim() == 1 else one.scale.unsqueeze(-1)
        return out.add_(torch.matmul(one.left.float().t(), torch.matmul(one.right.float(), x.float()).mul_(scale)))


@handles(torch.mm, Tensor.mm)
def mm(input: Any, mat2: Any, **others: Any) -> Any:
    return NotImplemented if input.dim() != 2 else matmul(input, mat2, **others)


@handles(functional.embedding)
def embedding(input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *others: Any, **more: Any) -> Any:
    """padding_idx, scale_grad_by_freq and sparse are of gradients alone; max_norm writes to the weight."""
    if max_norm is not None or not is_open(weight) or weight.base.dim() != 2:
        return NotImplemented
    ids = input
    out = functional.embedding(ids, weight.base, padding_idx)
    flat = ids.reshape(-1)
    p = weight.left.index_select(1, flat).t().float() * weight.scale
    rows = kept(weight, out.view(-1, out.shape[-1]).float())
    with torch.autocast(out.device.type, enabled=False):
        return spread(p, weight.right.float(), rows).to(out.dtype).view(out.shape)


# ---------------------------------------------------------------------------------------------------- several matrices


@handles(torch.bmm, Tensor.bmm)
def bmm(input: Any, mat2: Any, **others: Any) -> Any:
    """Of weights taken one for each row or expert, on either side."""
    one, x = (input, mat2) if type(input) is PlusLowRank else (mat2, input)
    if others or not is_plain(x) or not is_open(one):
        return NotImplemented
    out = torch.bmm(one.base, kept(one, x)) if one is input else torch.bmm(kept(one, x), one.base)
    with torch.autocast(out.device.type, enabled=False):
        return out.add_(_batched(one, x, first=one is input))


def _batched(one: PlusLowRank, x: Tensor, *, first: bool) -> Tensor:
    """The thin part of a batch of products, whose first factor the weight is or not."""
    left = (one.left.float() * one.scale.view(-1, 1, 1)).permute(1, 2, 0)  # [E, m, K]
    right = one.right.float().permute(1, 0, 2)  # [E, K, n]
    return torch.bmm(left, torch.bmm(right, x.float())) if first else torch.bmm(torch.bmm(x.float(), left), right)


def _grouped(x: Any, one: Any, offs: Any = None, **others: Any) -> Any:
    """Rows of x in groups that end at `offs`, each times its group's matrix [n, m]."""
    if offs is None or any(value is not None for value in others.values()):
        return NotImplemented
    if not is_plain(x) or x.dim() != 2 or not is_open(one) or one.base.dim() != 3:
        return NotImplemented
    assert GROUPED is not None
    out = GROUPED(kept(one, x), one.base, offs=offs)
    group = torch.searchsorted(offs, torch.arange(x.shape[0], device=x.device, dtype=offs.dtype), right=True)
    group = group.clamp_max(one.shape[0] - 1)  # rows behind the last group: what they are is not defined
    thin = torch.zeros(out.shape, dtype=torch.float32, device=x.device)
    for k in range(one.left.shape[0]):
        p = (x.float() * one.left[k].index_select(0, group).float()).sum(-1, keepdim=True) * one.scale[k]
        thin.addcmul_(p, one.right[k].index_select(0, group).float())
    return out.add_(thin)


GROUPED = getattr(torch, "_grouped_mm", None)  # what functional.grouped_mm calls
if GROUPED is not None:
    handles(GROUPED)(_grouped)
