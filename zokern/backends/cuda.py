"""The compiled CUDA backend: one launch for a table, on the current stream; no synchronisation."""

from __future__ import annotations

import torch

from zokern.backends import native
from zokern.backends.scalars import Chain, Kind, Scalars, chain_on_device, on_device
from zokern.table import Table


def unavailable_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it works on CUDA tensors only"
    if native.import_error is not None:
        return native.import_error
    if not hasattr(native.extension, "cuda_run"):
        return (
            "zokern._C was built without CUDA kernels; rebuild where nvcc is found (ZOKERN_CUDA=on says where it looks)"
        )
    if torch.version.hip is not None:
        return "this PyTorch is for AMD GPUs; the Triton backend serves those"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device (torch.cuda.is_available() is False)"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "it needs compute capability 8.0 (Ampere) or newer"
    return None


def near(scalars: Scalars, device: torch.device) -> Scalars:
    """One seed and rounding seeds that the host knows travel in the launch itself."""
    return on_device(scalars, device, carried=True)


def run(table: Table, kind: Kind, scalars: Scalars) -> None:
    device = table.tensors.device
    stream = torch.cuda.current_stream(device)
    native.extension.cuda_run(
        native.make_pass(table, kind, near(scalars, device)),
        rule=kind.rule.id,
        dtype=native.DTYPES[table.dtype],
        state_dtype=native.DTYPES[table.state_dtype],
        device=device.index,
        stream=stream.cuda_stream,
    )
    table.read_on(stream)


def run_chain(table: Table, chain: Chain) -> None:
    device = table.tensors.device
    stream = torch.cuda.current_stream(device)
    there, parcel = chain_on_device(chain, device)
    parcel.send()
    native.extension.cuda_run_chain(
        native.make_chain(table, there),
        rule=chain.rule.id,
        dtype=native.DTYPES[table.dtype],
        state_dtype=native.DTYPES[table.state_dtype],
        device=device.index,
        stream=stream.cuda_stream,
    )
    table.read_on(stream)
