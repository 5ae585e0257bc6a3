"""Stand-ins for weights that have another value in each block of a batch's rows.

`PerBlock` holds N values of a small tensor, [N, *shape]; `BlockMatrix` is a weight with a matrix of low rank added in each
block, of which only the weight and the factors are in memory:

    W + sum_j scale[k, j] left[k, j]^T right[k, j]   in block k;   left [N, K, m], right [N, K, n], scale [N, K], W [m, n]

Both look like one weight of the usual shape. What is computed with them comes here: what is done often has a way of its own
(blockwise.py); everything else is done for each block and put together. Results are plain tensors where rows of the batch
took part, and else `PerBlock` again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zokern.placement.plus import ABOUT, SET_DATA
from zokern.placement.rows import NotInBlocks, Rows

Handler = Callable[..., Any]  # of the function, its arguments and names; NotImplemented: block by block
HANDLERS: dict[Any, Handler] = {}
IN_PLACE = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__")
TO_ROWS = {
    Tensor.expand,
    Tensor.expand_as,
    Tensor.repeat,
    torch.broadcast_to,
    Tensor.broadcast_to,
    torch.tile,
    Tensor.tile,
}
DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class Blocks(nn.Parameter):
    """What the two have in common. rows: of the forward that they are of. parameter: the name of what they come from."""

    rows: Rows
    parameter: str

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = {} if kwargs is None else kwargs
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(func, *args, **named)
            if result is not NotImplemented:
                return result
        if func in ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **named)
        if func == SET_DATA:
            raise NotInBlocks(f"the closure gives {name_of(args[0])} other data")
        if func == DATA:
            return args[0]
        return block_by_block(func, args, named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        return block_by_block(func, args, kwargs or {})

    def __deepcopy__(self, memo: Any) -> Any:
        raise NotInBlocks(f"the closure copies {self.parameter}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotInBlocks(f"the closure saves {self.parameter}")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<{self.parameter} in {self.rows.count} blocks: {tuple(self.shape)} {self.dtype}>"

    def of_block(self, k: int) -> Tensor:
        raise NotImplementedError


class PerBlock(Blocks):
    """each [N, *shape]."""

    each: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, rows: Rows, name: str, requires_grad: bool = False) -> PerBlock:
        made: PerBlock = torch.Tensor._make_wrapper_subclass(
            cls, values.shape[1:], dtype=values.dtype, device=values.device, requires_grad=requires_grad
        )
        return made

    def __init__(self, values: Tensor, rows: Rows, name: str, requires_grad: bool = False) -> None:
        self.each, self.rows, self.parameter = values, rows, name

    def of_block(self, k: int) -> Tensor:
        return self.each[k]


class BlockMatrix(Blocks):
    """base, left, right, scale: see above; or a stack of matrices, left [N, K, E, m], right [N, K, E, n], W [E, m, n].
    leaf: the weight as a leaf, whose cast autocast keeps. stored: `base` is the weight itself, and not a part of it."""

    base: Tensor
    left: Tensor
    right: Tensor
    scale: Tensor
    leaf: Tensor | None

    @staticmethod
    def __new__(cls, base: Tensor, rows: Rows, name: str, requires_grad: bool = False) -> BlockMatrix:
        made: BlockMatrix = torch.Tensor._make_wrapper_subclass(
            cls, base.shape, strides=base.stride(), dtype=base.dtype, device=base.device, requires_grad=requires_grad
        )
        return made

    def __init__(self, base: Tensor, rows: Rows, name: str, requires_grad: bool = False) -> None:
        self.base, self.rows, self.parameter, self.leaf = base, rows, name, None

    def of_block(self, k: int) -> Tensor:
        """The sum, written out for one block."""
        left, right = self.left[k].float(), self.right[k].float()
        total = self.base.float()
        for j in range(left.shape[0]):
            total = torch.addcmul(total, (left[j] * self.scale[k, j]).unsqueeze(-1), right[j].unsqueeze(-2))
        return total.to(self.base.dtype)


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    def note(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return note


def name_of(func: Any) -> str:
    return getattr(func, "__qualname__", None) or getattr(func, "__name__", None) or str(func)


def flagged(*operands: Any) -> Rows:
    """The rows of the stand-ins among the operands, which hear that they are used."""
    ours = [t for t in operands if isinstance(t, Blocks)]
    for one in ours:
        one.rows.used.add(one.parameter)
    return ours[0].rows


def split(x: Tensor, count: int) -> Tensor:
    """[R, ...] -> [N, R/N, ...], a view."""
    made: Tensor = x.unflatten(0, (count, x.shape[0] // count))
    return made


def block_by_block(func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """What a function makes of each block's values and rows."""
    leaves, tree = pytree.tree_flatten((tuple(args), dict(named)))
    ours = next(leaf for leaf in leaves if isinstance(leaf, Blocks))
    rows, name = flagged(*leaves), name_of(func)
    are_rows = [
        isinstance(t, Tensor) and not isinstance(t, Blocks) and rows.are(t, (ours.parameter, name, i))
        for i, t in enumerate(leaves)
    ]
    in_place = (name.endswith("_") and not name.endswith("__")) or name.rpartition(".")[2] in IN_PLACE
    if named.get("out") is not None or (in_place and (isinstance(leaves[0], Blocks) or not are_rows[0])):
        raise NotInBlocks(f"{name} writes {ours.parameter} to what all blocks share")
    parts = [
        list(split(t, rows.count).unbind()) if mine else None
        for t, mine in zip(leaves, are_rows, strict=True)
    ]  # fmt: skip
    results = []
    for k in range(rows.count):
        own = [
            t.of_block(k) if isinstance(t, Blocks) else t if part is None else part[k]
            for t, part in zip(leaves, parts, strict=True)
        ]
        given, named_too = pytree.tree_unflatten(own, tree)
        results.append(func(*given, **named_too))
    if in_place:
        return leaves[0]
    return _joined(results, rows, ours.parameter, name, any(are_rows), func in TO_ROWS)


def _joined(results: list[Any], rows: Rows, parameter: str, name: str, of_rows: bool, to_rows: bool) -> Any:
    trees = [pytree.tree_flatten(result) for result in results]
    joined = []
    for parts in zip(*(leaves for leaves, _ in trees), strict=True):
        if not isinstance(parts[0], Tensor):
            if any(part != parts[0] for part in parts):
                raise NotInBlocks(f"{name} of {parameter} is another {type(parts[0]).__name__} in each block")
            joined.append(parts[0])
        elif of_rows:
            if not parts[0].dim():
                raise NotInBlocks(f"{name} of {parameter} makes one number of the rows of a block")
            joined.append(torch.cat(parts))
        elif to_rows and rows.have(parts[0].shape, (parameter, name, "result")):  # repeated as often as there are rows
            joined.append(torch.cat([split(part, rows.count)[k] for k, part in enumerate(parts)]))
        else:
            joined.append(PerBlock(torch.stack(parts), rows, parameter))
    return pytree.tree_unflatten(joined, trees[0][1])
