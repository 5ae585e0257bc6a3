"""The Triton backend without a GPU: its own launch code, with Triton's compiler for a target that is not there.

Every kernel of the process is emulated, also those of tests: it is Triton's own launch that comes here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import struct
from typing import Any

from torch import Tensor

from . import cache
from .emulator import Emulator, allocation, watch
from .parse import PtxError

SAID = ("RULE", "DTYPE", "STATE", "DISTRIBUTION", "ROUNDING")  # constants that are part of a kernel's name
SCRATCH = ("global_scratch_size", "profile_scratch_size")  # Triton 3.4 has the first; a kernel gets a pointer for each


class Driver:
    """Stands for Triton's driver: says which GPU to compile for."""

    def __init__(self, arch: int | str) -> None:
        from benchmarks.machine_code.compilers import target

        self._target = target(arch)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def unavailable_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    return None


def install(emulator: Emulator) -> Any:
    """Makes zokern.backends.triton run on CPU tensors, in this process, for good. Before Triton is imported."""
    if reason := unavailable_reason():
        raise PtxError(f"Triton's kernels cannot be emulated: {reason}")
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = str(cache.folder() / "triton")
    import triton

    triton.runtime.driver.set_active(Driver(emulator.arch))
    launch_nothing = triton.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = launch_nothing(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            _launch(emulator, self, compiled, grid, args, kwargs)
        return compiled

    triton.JITFunction.run = run
    from zokern.backends import triton as backend
    from zokern.backends.triton import launch

    backend.unavailable_reason = lambda device=None: None  # type: ignore[assignment]
    watch(launch, emulator)
    return backend


def _launch(emulator: Emulator, jit: Any, compiled: Any, grid: Any, args: Any, kwargs: Any) -> None:
    bound, *_ = jit.device_caches[0][-1](*args, **kwargs)
    bound = dict(bound)
    if callable(grid):
        grid = grid(bound)
    if any(n != 1 for n in grid[1:]):
        raise PtxError(f"a grid of {grid}")
    metadata, signature = compiled.metadata, compiled.src.signature
    if any(getattr(metadata, name, 0) for name in SCRATCH):
        raise PtxError("a kernel with scratch memory")
    if getattr(metadata, "num_ctas", 1) != 1:
        raise PtxError("clusters")
    text = emulator.interpreter.text_of(compiled.asm)
    name = _name(jit.__name__, text, tuple(str(bound[k]) for k in SAID if k in bound))
    kernel = emulator.program(name, lambda: text).kernel
    values, more = [], []
    for key, value in bound.items():
        if signature[key] == "constexpr":
            continue
        if isinstance(value, Tensor):
            more += allocation(value, key, writable=not emulator.allocations)  # a table says what a pass may write
            value = value.data_ptr()
        if signature[key] == "fp32":
            (value,) = struct.unpack("<I", struct.pack("<f", value))
        values.append(int(value))
    params = emulator.interpreter.params(kernel)
    # Pointers to scratch memory; Triton 3.6 tells of one of AMD's two.
    pointers = sum(hasattr(metadata, name) for name in SCRATCH) if isinstance(emulator.arch, int) else len(SCRATCH)
    if len(params) != len(values) + pointers:
        raise PtxError(f"{len(params)} parameters for {len(values)} values and {pointers} scratch pointers")
    raw = bytearray(kernel.param_bytes)
    for (at, size), value in zip(params, [*values, *[0] * pointers], strict=True):
        raw[at : at + size] = struct.pack("<Q", value & (1 << 64) - 1)[:size]
    threads = metadata.num_warps * metadata.warp_size
    emulator.run(name, grid[0], threads, bytes(raw), more, metadata.shared)


@functools.cache
def _name(function: str, text: str, constants: tuple[str, ...]) -> str:
    return " ".join(["triton", function, hashlib.sha256(text.encode()).hexdigest()[:12], *constants])
