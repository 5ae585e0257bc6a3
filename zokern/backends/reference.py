"""The reference backend: the contract (zokern/contract) on the memory of CPU tensors. For tests and for reading, not for speed."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from zokern.backends.scalars import Chain, Kind, Scalars
from zokern.contract import reference, reference_rules
from zokern.passes.table import DST, PROBE, SRC, Table

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def unavailable_reason(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "it works on CPU tensors only"


def _memory(address: int, numel: int, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """A view of a tensor's memory: float32, or the uint16 bits of a 16-bit type."""
    scalar = ctypes.c_float if dtype == torch.float32 else ctypes.c_uint16
    view: np.ndarray[Any, Any] = np.ctypeslib.as_array((scalar * numel).from_address(address))
    return view


def near(scalars: Scalars, device: torch.device) -> Scalars:
    """The host has them."""
    return scalars


def run(table: Table, kind: Kind, scalars: Scalars) -> None:
    if scalars.enabled is not None and int(scalars.enabled) == 0:
        return
    rule, state_dtype = kind.rule, _NAMES[table.state_dtype]
    weights_seed, state_seed = scalars.rounding_seed.tolist() if scalars.rounding_seed is not None else (0, 0)
    for numel, offset, tensor_id, group, _, src, dst, *addresses, _ in table.tensors.tolist():
        states = {name: _memory(at, numel, table.state_dtype) for name, at in zip(rule.states, addresses, strict=False)}
        result, changed = reference_rules.apply(
            rule.name,
            _memory(src, numel, table.dtype),
            {name: reference.widen(stored, state_dtype) for name, stored in states.items()},
            dtype=_NAMES[table.dtype],
            tensor_id=tensor_id,
            seeds=scalars.seeds.tolist(),
            coefs=dict(zip(rule.coefs, scalars.coefs[group].tolist(), strict=True)),
            scalars=dict(zip(rule.scalars, scalars.shared[group].tolist(), strict=True)),
            distribution=kind.distribution,
            rounding=kind.rounding,
            rounding_seed=weights_seed,
            offset=offset,
            square_of_sum=kind.square_of_sum,
        )
        _memory(dst, numel, table.dtype)[:] = result
        for name in rule.states[: 1 if kind.keep_second else rule.written]:
            random = reference.rounding_bits(numel, state_seed, tensor_id, offset)
            states[name][:] = reference.round_to(changed[name], state_dtype, "stochastic", random)


def run_chain(table: Table, chain: Chain) -> None:
    """One pass after another, through memory."""
    stages = [(kind, replace(scalars, enabled=chain.enabled)) for kind, scalars in chain.stages]
    for i, (kind, scalars) in enumerate(stages[:-1] if chain.fork else stages):
        run(table if i == 0 else _moved(table, src=DST), kind, scalars)
    if chain.fork:
        run(_moved(table, src=DST, dst=PROBE), chain.stages[-1][0], chain.stages[-1][1])


def _moved(table: Table, src: int, dst: int = DST) -> Table:
    """The table with other columns as src and dst, without the tensors that have none."""
    rows = table.tensors.clone()
    rows[:, SRC], rows[:, DST] = table.tensors[:, src], table.tensors[:, dst]
    return replace(table, tensors=rows[rows[:, DST] != 0])
