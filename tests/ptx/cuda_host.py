"""The CUDA backend without a GPU: its own host code decides what is launched, on CPU tensors.

The project's objects are linked once more (build.py); a launch comes here instead of to the CUDA runtime.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import build
from .emulator import Emulator, allocation, watch
from .parse import PtxError

# As shim.cpp's Hook: kernel, grid, block, arguments, shared bytes.
HOOK = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t
)


class OnDevice(Tensor):
    """A CPU tensor that says it is on a GPU: a number that only the device knows."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


def on_device(t: Tensor) -> Tensor:
    return t.as_subclass(OnDevice)


class Extension:
    """zokern._C whose launches go to the emulator. An error there is raised where the launch was asked for."""

    def __init__(self, module: Any, path: str, emulator: Emulator) -> None:
        self._module, self._emulator = module, emulator
        self.texts = build.ptx_of(emulator.arch)  # of all kernels, by name
        self._error: BaseException | None = None
        self._hook = HOOK(self._launch)  # kept: the module has its address
        ctypes.CDLL(path).zk_launch_hook(self._hook)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if name not in ("cuda_run", "cuda_run_chain", "cuda_fill_factors", "cuda_normal_checksum"):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            self._error = None
            result = value(*args, **{**kwargs, "device": 0, "stream": 0})
            if self._error is not None:
                raise self._error
            return result

        return call

    def checksum(self, first: int, last: int) -> int:
        """The sum over the normals of some words, by the kernel that has a loop over the grid."""
        found = torch.zeros(1, dtype=torch.int64)
        self._emulator.allocations = allocation(found, "sum", True)
        try:
            self.cuda_normal_checksum(first=first, last=last, sum=found.data_ptr())
        finally:
            self._emulator.allocations = []
        return int(found[0]) % 2**64

    def _launch(self, kernel: bytes, grid: int, block: int, arguments: Any, shared: int) -> None:
        try:
            name = build.plain_name(kernel.decode())
            if name not in self.texts:
                raise PtxError(f"{name} is launched, but no object has its PTX")
            params = self._emulator.program(name, lambda: self.texts[name]).kernel
            raw = bytearray(params.param_bytes)
            for n, (at, size) in enumerate(sorted(params.params.values())):
                raw[at : at + size] = ctypes.string_at(arguments[n], size)
            self._emulator.run(name, grid, block, bytes(raw), shared=shared)
        except BaseException as error:  # it cannot pass through the C++ that called
            self._error = error


def install(emulator: Emulator) -> Any:
    """Makes zokern.backends.cuda run on CPU tensors, in this process, for good. Before zokern is imported."""
    if reason := build.unavailable_reason():
        raise PtxError(f"CUDA kernels cannot be emulated: {reason}")
    if "zokern._C" in sys.modules:
        raise PtxError("zokern._C is imported already")
    path = build.module_without_gpu()
    spec = importlib.util.spec_from_file_location("zokern._C", path)
    if spec is None or spec.loader is None:
        raise PtxError(f"{path} is no module")
    module = importlib.util.module_from_spec(spec)
    sys.modules["zokern._C"] = module
    spec.loader.exec_module(module)

    from zokern.backends import cuda, native
    from zokern.passes.table import Table

    native.extension = Extension(module, str(path), emulator)
    stream = SimpleNamespace(cuda_stream=0)
    there = SimpleNamespace(current_stream=lambda device: stream)
    cuda.torch = SimpleNamespace(cuda=there, device=torch.device)  # type: ignore[assignment]
    cuda.unavailable_reason = lambda device: None  # type: ignore[assignment]
    # A launch is over before its table can be freed.
    Table.read_on = lambda self, stream: None  # type: ignore[method-assign]
    watch(cuda, emulator)
    return cuda
