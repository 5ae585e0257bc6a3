"""What stands in for a block's parameter while the block does not run, under placement="stream"."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from zokern.placement.base import RefusedCall


class OutsideItsBlock(nn.Parameter):
    """Stands in for a block's parameter while that block is not running; knows its shape, refuses to be computed with.

    It has no memory: whatever reads values ends at the dispatcher, also from C++, and finds none that are clean.
    """

    parameter: str
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        every = [*args, *(kwargs or {}).values()]
        flat = [a for x in every for a in (x if isinstance(x, (list, tuple)) else [x])]
        _refuse(*(a.parameter for a in flat if isinstance(a, cls)))

    def data_ptr(self) -> int:
        _refuse(self.parameter)

    def full_tensor(self, *_: Any, **__: Any) -> NoReturn:
        """A DTensor's."""
        _refuse(self.parameter)

    to_local = redistribute = full_tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":  # it would be lost
            _refuse(self.parameter)
        super().__setattr__(name, value)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<{self.parameter}, outside its block: {tuple(self.shape)} {self.dtype}>"


def _refuse(*names: str) -> NoReturn:
    listed = ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
    raise RefusedCall(
        f"{listed or 'a parameter'} was used outside its block's forward, where placement='stream' has no perturbed copy "
        "of it; use placement='shadow' for this model"
    )


def stand_in(param: Tensor, name: str) -> OutsideItsBlock:
    """For `param`, with its shape, dtype and device."""
    made: OutsideItsBlock = torch.Tensor._make_wrapper_subclass(
        OutsideItsBlock,
        param.shape,
        strides=param.stride(),
        dtype=param.dtype,
        device=param.device,
        requires_grad=param.requires_grad,
    )
    own = ("_local_tensor", "_spec")  # of a DTensor
    made.__dict__.update({key: value for key, value in param.__dict__.items() if key not in own})  # of libraries
    made.parameter = name
    return made
