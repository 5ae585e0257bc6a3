"""The reference backend: zokern/contract on the memory of CPU tensors. For tests and for reading, not for speed."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from zokern.contract import reference, reference_rules
from zokern.passes.spec import Chain, PassNumbers, PassSpec
from zokern.passes.table import DST, PROBE, SRC, Table

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def unavailable_reason(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "it works on CPU tensors only"


def _memory(address: int, numel: int, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """A view of a tensor's memory: float32, or the uint16 bits of a 16-bit type."""
    scalar = ctypes.c_float if dtype == torch.float32 else ctypes.c_uint16
    view: np.ndarray[Any, Any] = np.ctypeslib.as_array((scalar * numel).from_address(address))
    return view


near = None  # numbers are read wherever they are


def run(table: Table, spec: PassSpec, numbers: PassNumbers) -> None:
    if numbers.enabled is not None and int(numbers.enabled) == 0:
        return
    rule, state_dtype = spec.rule, _NAMES[table.state_dtype]
    weights_seed, state_seed = numbers.rounding_seed.tolist() if numbers.rounding_seed is not None else (0, 0)
    shapes: list[tuple[int, ...] | None] = [None] * len(table.tensors)
    if table.factors is not None:
        shapes = [(count, height, width) for width, height, count, *_ in table.factors.rows.tolist()]
    for (numel, offset, tensor_id, group, _, src, dst, *addresses, _), shape in zip(
        table.tensors.tolist(), shapes, strict=True
    ):
        states = {name: _memory(at, numel, table.state_dtype) for name, at in zip(rule.states, addresses, strict=False)}
        result, changed = reference_rules.apply(
            rule.name,
            _memory(src, numel, table.dtype),
            {name: reference.widen(stored, state_dtype) for name, stored in states.items()},
            dtype=_NAMES[table.dtype],
            tensor_id=tensor_id,
            seeds=numbers.seeds.tolist(),
            coefs=dict(zip(rule.coefs, numbers.coefs[group].tolist(), strict=True)),
            scalars=dict(zip(rule.scalars, numbers.shared[group].tolist(), strict=True)),
            distribution=spec.direction.name,
            rounding=spec.rounding,
            rounding_seed=weights_seed,
            offset=offset,
            square_of_sum=spec.square_of_sum,
            shape=shape,
        )
        _memory(dst, numel, table.dtype)[:] = result
        for name in rule.states[: 1 if spec.keep_second else rule.written]:
            random = reference.rounding_bits(numel, state_seed, tensor_id, offset)
            states[name][:] = reference.round_to(changed[name], state_dtype, "stochastic", random)


def run_chain(table: Table, chain: Chain) -> None:
    """One pass after another, through memory."""
    stages = [(spec, replace(numbers, enabled=chain.enabled)) for spec, numbers in chain.stages]
    for i, (spec, numbers) in enumerate(stages[:-1] if chain.fork else stages):
        run(table if i == 0 else _moved(table, src=DST), spec, numbers)
    if chain.fork:
        run(_moved(table, src=DST, dst=PROBE), chain.stages[-1][0], chain.stages[-1][1])


def _moved(table: Table, src: int, dst: int = DST) -> Table:
    """The table with other columns as src and dst, without the tensors that have none."""
    rows = table.tensors.clone()
    rows[:, SRC], rows[:, DST] = table.tensors[:, src], table.tensors[:, dst]
    kept, factors = rows[:, DST] != 0, table.factors
    if factors is not None:
        factors = replace(factors, rows=factors.rows[kept])
    return replace(table, tensors=rows[kept], factors=factors)
