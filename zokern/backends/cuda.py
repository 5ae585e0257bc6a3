"""The compiled CUDA backend: one launch for a table, on the current stream; no synchronisation."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from zokern.backends import factored, native
from zokern.backends.transfer import chain_on_device, on_device
from zokern.passes.factors import FactorTable, Piece
from zokern.passes.spec import Chain, PassNumbers, PassSpec
from zokern.passes.table import Table


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
    capability = torch.cuda.get_device_capability(device)
    if capability[0] < 8:
        return "it needs compute capability 8.0 (Ampere) or newer"
    built = native.extension.cuda_architectures
    if not has_code_for(built, capability):
        wanted = "{}.{}".format(*capability)
        return (
            f"zokern._C was built for {' '.join(built.split())}, and {torch.cuda.get_device_name(device)} has compute "
            f"capability {wanted}; rebuild with TORCH_CUDA_ARCH_LIST={wanted}, or use the Triton backend"
        )
    return None


@functools.cache
def has_code_for(built: str, capability: tuple[int, int]) -> bool:
    """Whether code for `built`, architectures in CMake's words ("80-real 100-virtual"), runs on a device.

    Machine code ("real") runs on devices of its major number from its minor on, PTX ("virtual") on all from its number
    on; what has an "a" runs on that device alone, what has an "f" on its major number's from its minor on. A word that
    names no number ("native") says nothing: then a launch will tell.
    """
    for word in built.split():
        found = re.fullmatch(r"(\d+)(\d)([af]?)(?:-(real|virtual))?", word)
        if found is None:
            return True
        number, suffix, form = (int(found[1]), int(found[2])), found[3], found[4]
        if suffix == "a":
            runs = number == capability
        elif suffix == "f" or form == "real":
            runs = number <= capability < (number[0] + 1, 0)
        else:  # PTX, with machine code of the same number or without
            runs = number <= capability
        if runs:
            return True
    return False


def near(numbers: PassNumbers, device: torch.device) -> PassNumbers:
    """One seed and rounding seeds that the host knows travel in the launch itself."""
    return on_device(numbers, device, carried=True)


def run(table: Table, spec: PassSpec, numbers: PassNumbers) -> None:
    device = table.tensors.device
    numbers, stream = near(numbers, device), torch.cuda.current_stream(device)
    cut = factored.WHOLE if table.factors is None else factored.pieces(table, table.factors, [numbers.seeds], fill)
    for place, factors in cut:
        native.extension.cuda_run(
            native.make_pass(table, spec, numbers, place, factors),
            rule=spec.rule.id,
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
    cut = factored.WHOLE if table.factors is None else factored.pieces(table, table.factors, there.seeds, fill)
    for place, factors in cut:
        native.extension.cuda_run_chain(
            native.make_chain(table, there, place, factors),
            rule=chain.rule.id,
            dtype=native.DTYPES[table.dtype],
            state_dtype=native.DTYPES[table.state_dtype],
            device=device.index,
            stream=stream.cuda_stream,
        )
    table.read_on(stream)


def fill(factors: FactorTable, piece: Piece, seeds: Tensor, address: int) -> None:
    """The factors of these seeds, on the device unless there is one alone, to the address."""
    device = factors.sides.device
    native.extension.cuda_fill_factors(
        factored.make_fill(factors, piece, seeds, address),
        device=device.index,
        stream=torch.cuda.current_stream(device).cuda_stream,
    )
