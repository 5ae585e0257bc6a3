"""A CUDA graph's rules on the CPU: work is recorded operation by operation, and a replay does the same operations on the
same memory. What Python computed while it was recorded stays as it was, and asking for a value is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zokern import sweep

# What a CUDA error says after its first line.
ADVICE = """
Search for `cudaErrorStreamCaptureUnsupported' in https://docs.nvidia.com/cuda/cuda-runtime-api for more information.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""
ASKS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero", "aten::item"}


class Recorder(TorchDispatchMode):
    def __init__(self, work: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        if name in ASKS:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing{ADVICE}")
        if name == "aten::lift_fresh":  # torch.tensor(...): on a GPU this is a copy from the host
            raise RuntimeError(f"a tensor was made from host numbers: not permitted when stream is capturing{ADVICE}")
        if name == "aten::index" and any(t is not None and t.dtype == torch.bool for t in args[1]):
            raise RuntimeError(f"a mask's length is a value: operation not permitted when stream is capturing{ADVICE}")
        out = func(*args, **(kwargs or {}))
        self.work.append((func, args, kwargs or {}, out))
        return out


class EmulatedGraph:
    def __init__(self, device: torch.device, pool: Any) -> None:
        self.work: list[tuple[Any, ...]] = []

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def capture(self, work: Callable[[], None]) -> None:
        chain = sweep.run_chain

        def recorded(*args: Any, **named: Any) -> int:
            """PyTorch's dispatcher sees no chain."""
            self.work.append((lambda: chain(*args, **named) and None, (), {}, None))
            return chain(*args, **named)

        sweep.run_chain = recorded
        try:
            with Recorder(self.work):
                work()
        finally:
            sweep.run_chain = chain

    def launch(self) -> None:
        for func, args, kwargs, out in self.work:
            again = func(*args, **kwargs)
            flat, flat_again = ([x] if isinstance(x, Tensor) else x for x in (out, again))
            for old, new in zip(flat or (), flat_again or (), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
