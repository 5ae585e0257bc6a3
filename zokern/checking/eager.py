"""One evaluation that is looked into: which weights its operations read, and which modules it calls."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Reads(TorchDispatchMode):
    """Notes the tensors, by id, whose memory an operation reads. A view of one is not read by that alone.

    Memory is found by address, so views and tied weights count as what they look at; what kernels of others read without
    PyTorch's dispatcher is not seen.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, id(t)) for t in tensors)
        self.starts = [start for start, _, _ in spans]
        self.spans = spans
        self.longest = max((end - start for start, end, _ in spans), default=0)
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_view(func):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self._note(leaf)
        return func(*args, **(kwargs or {}))

    def _note(self, t: Tensor) -> None:
        try:
            begin = t.data_ptr()
        except RuntimeError:  # has no memory of its own
            return
        strides = zip(t.shape, t.stride(), strict=True)
        end = begin + (1 + sum((size - 1) * stride for size, stride in strides)) * t.element_size() if t.numel() else 0
        at = bisect.bisect_left(self.starts, begin - self.longest)
        while at < len(self.spans) and self.starts[at] < end:
            if self.spans[at][1] > begin:
                self.seen.add(self.spans[at][2])
            at += 1


def _is_view(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    return schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


@contextlib.contextmanager
def forced() -> Iterator[None]:
    """Inside, what torch.compile made is left aside: its Python runs instead, on the weights as they are."""
    with torch.compiler.set_stance("force_eager"):
        yield


def refuse_scripts(module: nn.Module | None) -> None:
    """What has no hooks, by which calls are seen."""
    for name, child in module.named_modules() if module is not None else ():
        if isinstance(child, torch.jit.RecursiveScriptModule):  # type: ignore[attr-defined]
            raise TypeError(
                f"check sees a module's calls through hooks, which {name or 'the model'}, a {type(child).__name__}, does "
                "not have; give the module that it was made of, and a closure that runs that"
            )


class Calls:
    """Notes the modules, by id, that are called while it is entered."""

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module
        self.seen: set[int] = set()
        self.hooks: list[Any] = []

    def __enter__(self) -> Calls:
        for child in [] if self.module is None else self.module.modules():
            self.hooks.append(child.register_forward_pre_hook(self._note))
        return self

    def _note(self, module: nn.Module, _: Any) -> None:
        self.seen.add(id(module))

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
