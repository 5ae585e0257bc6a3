"""The compiled CPU backend: AVX-512, AVX2 or plain, chosen at run time, and NEON on Arm; same bits on all.

$ZOKERN_CPU_ISA forces an instruction set. The number of threads is torch.get_num_threads().
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from zokern.backends import factored, native
from zokern.backends.transfer import chain_on_host, on_host
from zokern.passes.factors import FactorTable, Piece
from zokern.passes.spec import Chain, PassNumbers, PassSpec
from zokern.passes.table import Table

ENVIRONMENT = "ZOKERN_CPU_ISA"


def unavailable_reason(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it works on CPU tensors only"
    return native.import_error


AVAILABLE: list[str] = [] if native.extension is None else native.extension.cpu_instruction_sets()  # the best one first


def forced(instructions: str) -> str:
    """Those that the environment names."""
    if instructions not in AVAILABLE:
        raise ValueError(f"{ENVIRONMENT} is {instructions!r}; this build and processor have {', '.join(AVAILABLE)}")
    return instructions


near = None  # `run` reads numbers of the host, and brings others there


def run(table: Table, spec: PassSpec, numbers: PassNumbers) -> None:
    rounding, enabled = numbers.rounding_seed, numbers.enabled
    known = numbers.seeds.is_cpu and numbers.coefs.is_cpu and numbers.shared.is_cpu
    if not (known and (rounding is None or rounding.is_cpu) and (enabled is None or enabled.is_cpu)):
        numbers = on_host(numbers)
    named = os.environ.get(ENVIRONMENT)
    cut = factored.WHOLE if table.factors is None else factored.pieces(table, table.factors, [numbers.seeds], fill)
    for place, factors in cut:
        native.extension.cpu_run(
            native.make_pass(table, spec, numbers, place, factors),
            rule=spec.rule.id,
            dtype=native.DTYPES[table.dtype],
            state_dtype=native.DTYPES[table.state_dtype],
            threads=torch.get_num_threads(),
            instruction_set=AVAILABLE[0] if named is None else forced(named),
        )


def run_chain(table: Table, chain: Chain) -> None:
    chain, named = chain_on_host(chain), os.environ.get(ENVIRONMENT)
    cut = factored.WHOLE if table.factors is None else factored.pieces(table, table.factors, chain.seeds, fill)
    for place, factors in cut:
        native.extension.cpu_run_chain(
            native.make_chain(table, chain, place, factors),
            rule=chain.rule.id,
            dtype=native.DTYPES[table.dtype],
            state_dtype=native.DTYPES[table.state_dtype],
            threads=torch.get_num_threads(),
            instruction_set=AVAILABLE[0] if named is None else forced(named),
        )


def fill(factors: FactorTable, piece: Piece, seeds: Tensor, address: int) -> None:
    """The factors of these seeds, which the host has, to the address."""
    named = os.environ.get(ENVIRONMENT)
    native.extension.cpu_fill_factors(
        factored.make_fill(factors, piece, seeds, address),
        threads=torch.get_num_threads(),
        instruction_set=AVAILABLE[0] if named is None else forced(named),
    )
