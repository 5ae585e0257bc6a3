"""The reference backend: zokern.reference on the memory of CPU tensors. For tests and for reading, not for speed."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

from zokern import reference
from zokern.backends.scalars import Scalars
from zokern.table import Table

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def unavailable_reason(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "it works on CPU tensors only"


def _memory(address: int, numel: int, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """A view of a tensor's memory: float32, or the uint16 bits of a 16-bit type."""
    scalar = ctypes.c_float if dtype == torch.float32 else ctypes.c_uint16
    view: np.ndarray[Any, Any] = np.ctypeslib.as_array((scalar * numel).from_address(address))
    return view


def add_noise(table: Table, scalars: Scalars, distribution: str, rounding: str) -> None:
    if scalars.enabled is not None and int(scalars.enabled) == 0:
        return
    for numel, offset, tensor_id, group, _, src, dst, _ in table.tensors.tolist():
        _memory(dst, numel, table.dtype)[:] = reference.add_noise(
            _memory(src, numel, table.dtype),
            dtype=_NAMES[table.dtype],
            tensor_id=tensor_id,
            seeds=scalars.seeds.tolist(),
            coefs=scalars.coefs[group].tolist(),
            decay=float(scalars.decays[group]),
            distribution=distribution,
            rounding=rounding,
            rounding_seed=int(scalars.rounding_seed) if scalars.rounding_seed is not None else 0,
            offset=offset,
        )
