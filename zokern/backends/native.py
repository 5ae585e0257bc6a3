"""What the two backends of the compiled module share: its import, its enums, and the arguments of a pass."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from zokern.passes.spec import Chain, PassNumbers, PassSpec
from zokern.passes.table import Table

STAGE_COLUMNS = 9  # of stage_rows
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

extension: Any = None
import_error: str | None = None
try:
    extension = importlib.import_module("zokern._C")
except ImportError as error:
    import_error = f"zokern._C cannot be imported ({error}); build it: pip install --no-build-isolation -e ."


def make_pass(table: Table, spec: PassSpec, numbers: PassNumbers) -> Any:
    """The pass as csrc/pass.h has it. Seeds in host memory travel in the launch itself where there is but one."""
    seeds, rounding_seed = numbers.seeds, numbers.rounding_seed
    seed_known = seeds.device.type == "cpu" and seeds.numel() == 1
    rounding_known = rounding_seed is None or rounding_seed.device.type == "cpu"
    weights, state = rounding_seed.tolist() if rounding_seed is not None and rounding_known else (0, 0)
    return extension.Pass(
        tensors=table.tensors.data_ptr(),
        chunks=table.chunks.data_ptr(),
        num_chunks=table.chunks.shape[0],
        coefs=numbers.coefs.data_ptr(),
        scalars=numbers.shared.data_ptr(),
        seeds=0 if seed_known else seeds.data_ptr(),
        seed=int(seeds[0]) if seed_known else 0,
        num_seeds=seeds.numel(),
        rounding_seed=0 if rounding_known or rounding_seed is None else rounding_seed.data_ptr(),
        known_rounding_seed=weights,
        known_state_seed=state,
        enabled=0 if numbers.enabled is None else numbers.enabled.data_ptr(),
        rademacher=spec.direction.name == "rademacher",
        stochastic=spec.rounding == "stochastic",
        square_of_sum=spec.square_of_sum,
        keep_second=spec.keep_second,
    )


def make_chain(table: Table, chain: Chain) -> Any:
    """The chain as csrc/pass.h has it; all numbers are in the memory of the table's device."""
    return extension.Chain(
        tensors=table.tensors.data_ptr(),
        chunks=table.chunks.data_ptr(),
        num_chunks=table.chunks.shape[0],
        enabled=0 if chain.enabled is None else chain.enabled.data_ptr(),
        rademacher=chain.stages[0][0].direction.name == "rademacher",
        fork=chain.fork,
        keep_second=chain.keep_second,
        stages=stage_rows(chain),
    )


def stage_rows(chain: Chain) -> list[tuple[int, ...]]:
    """Addresses of seeds, coefs, scalars and rounding seeds; number of seeds; four flags: pass.h's Stage."""
    return [
        (
            numbers.seeds.data_ptr(),
            numbers.coefs.data_ptr(),
            numbers.shared.data_ptr(),
            0 if numbers.rounding_seed is None else numbers.rounding_seed.data_ptr(),
            numbers.seeds.numel(),
            spec.rule != chain.rule,
            spec.rounding == "stochastic",
            spec.square_of_sum,
            spec.keep_second,
        )
        for spec, numbers in chain.stages
    ]
