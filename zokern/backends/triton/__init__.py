"""The Triton backend: the same passes and the same bits as the others, compiled at run time for NVIDIA and AMD GPUs.

Importing this package imports no Triton, so that `unavailable_reason` can say why the backend cannot be used. With
TRITON_INTERPRET=1 in the environment before Triton is imported, it runs on CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import importlib
import re

import torch
from torch import Tensor

from zokern.backends.transfer import on_device
from zokern.passes.factors import FactorTable, Piece
from zokern.passes.spec import Chain, PassNumbers, PassSpec
from zokern.passes.table import Table
from zokern.passes.update import sent

__all__ = ["NAME", "fill", "near", "run", "unavailable_reason"]

NAME = "triton"
MINIMUM_VERSION = (3, 4)


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why this backend cannot be used on `device` (None: on any device), or None if it can."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton"
    match = re.match(r"(\d+)\.(\d+)", triton.__version__)
    wanted = ".".join(map(str, MINIMUM_VERSION))
    if match is None or (int(match[1]), int(match[2])) < MINIMUM_VERSION:
        return f"Triton {triton.__version__} is installed, but {wanted} or newer is needed"
    if triton.knobs.runtime.interpret:
        only = "in its interpreter (TRITON_INTERPRET is set) it works on CPU tensors only"
        return only if device is not None and device.type != "cpu" else None
    if device is not None and device.type != "cuda":
        return "it works on GPU tensors only (on CPU tensors with TRITON_INTERPRET=1, slowly, for tests)"
    if not torch.cuda.is_available():  # torch.cuda is also PyTorch's name for AMD's HIP devices
        return "PyTorch sees no CUDA or HIP device (torch.cuda.is_available() is False)"
    return None


def near(numbers: PassNumbers, device: torch.device) -> PassNumbers:
    """Everything is read from the memory of the device."""
    return on_device(numbers, device)


def run(table: Table, spec: PassSpec, numbers: PassNumbers) -> None:
    """One pass over a table (zokern/passes/table.py): one launch on the current stream, without synchronisation."""
    from .launch import run as launch

    launch(table, spec, near(numbers, table.tensors.device))


def run_chain(table: Table, chain: Chain) -> None:
    """A chain over one table: one launch, as above."""
    from .launch import run_chain as launch

    launch(table, chain)


def fill(factors: FactorTable, piece: Piece, seeds: Tensor, address: int) -> None:
    """The factors of these seeds to an address of the device: one launch, as above."""
    from .launch import fill as launch

    launch(factors, piece, sent(seeds, factors.sides.device), address)
