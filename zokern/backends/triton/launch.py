"""Launches the Triton pass: one kernel launch for all tensors of a call, on the stream current on their device.

Seeds, coefficients, scalars and the `enabled` flag stay in device memory, so a launch never synchronises and can be
captured in a CUDA graph. Nothing is autotuned: the kernel works in place and a trial run would change the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zokern.backends import factored
from zokern.backends.native import STAGE_COLUMNS, stage_rows
from zokern.backends.transfer import chain_on_device
from zokern.contract.rules import RULES, Rule
from zokern.directions import Direction, rank
from zokern.passes.factors import FactorTable, Piece
from zokern.passes.spec import Chain, PassNumbers, PassSpec, rule_of_probes
from zokern.passes.table import CHUNK, COLUMNS, PROBE, Table

from .chain import chain_kernel
from .interpreter import exact_arithmetic
from .kernels import pass_kernel
from .lowrank import fill_kernel
from .rules import SERVED

NUM_WARPS = 4
INTERPRETED = not isinstance(pass_kernel, triton.JITFunction)
# No contraction of a*b + c, and no overflow checks under TRITON_DEBUG: the noise's integers wrap around on purpose.
LAUNCH_OPTIONS: dict[str, object] = {
    "num_warps": NUM_WARPS,
    "num_stages": 1,
    "enable_fp_fusion": False,
    "sanitize_overflow": False,
}
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _check_rules() -> None:
    """At import, which is the backend's first use."""
    unknown, more = [name for name in RULES if name not in SERVED], [name for name in SERVED if name not in RULES]
    if unknown or more:
        raise RuntimeError(
            "zokern's Triton kernels and zokern/contract/rules.py have other rules: "
            + "; ".join(
                [f"{name} is missing in zokern/backends/triton/rules.py" for name in unknown]
                + [f"{name} is missing in zokern/contract/rules.py" for name in more]
            )
            + ". Reinstall zokern, or write what is missing."
        )


_check_rules()


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _launch_context(device: torch.device) -> AbstractContextManager[object]:
    if INTERPRETED:
        return exact_arithmetic()
    return torch.cuda.device(device) if on_gpu(device) else nullcontext()


def has_packed_pairs(target: Any) -> bool:
    """Whether a compiler's target (triton's GPUTarget) has float32 operations on two elements: packed.py."""
    return bool(_nvidia(target) and 100 <= target.arch < 110)


def in_pairs(target: Any, dtype: torch.dtype) -> bool:
    """Whether noise and sums go in packed pairs. Of float32 weights, and of what comes after the sums, LLVM's own choice of
    pairs takes fewer instructions."""
    return has_packed_pairs(target) and dtype != torch.float32


def apart(target: Any, dtype: torch.dtype, distribution: str) -> bool:
    """Whether cosines and sines are kept apart, so that LLVM pairs them for AMD (kernels.py). Of float32 weights it finds
    the pairs."""
    return bool(_amd(target) and dtype != torch.float32 and distribution == "normal")


def block(target: Any) -> int:
    """Noise blocks (8 elements) of a tile: one for each thread. AMD's warps have 64 threads, some of its GPUs' 32."""
    return (32 if target is None else int(target.warp_size)) * NUM_WARPS


def of_target(target: Any, dtype: torch.dtype) -> dict[str, bool]:
    """Constants of every kernel that depend on the GPU. UNFUSED (rounding.py): gfx1250 may fuse for bfloat16 too."""
    fused = [torch.float16, torch.bfloat16] if _amd(target) and target.arch.startswith("gfx125") else [torch.float16]
    return {"PACKED": in_pairs(target, dtype), "UNFUSED": _amd(target) and dtype in fused}


def current_target() -> Any:
    """Triton's GPUTarget of the current GPU; None in its interpreter."""
    return None if INTERPRETED else triton.runtime.driver.active.get_current_target()


def _nvidia(target: Any) -> bool:
    return target is not None and target.backend == "cuda"


def _amd(target: Any) -> bool:
    return target is not None and target.backend == "hip"


def options(target: Any, rule: Rule, dtype: torch.dtype, rounding: str, distribution: str) -> dict[str, object]:
    """What a pass is compiled with. ptxas would take 96 registers or 80 for those with the most numbers, and spill."""
    if apart(target, dtype, distribution):
        # LLVM then keeps to the registers of four waves of a SIMD, 128 on MI300X: HELENE's update takes 85 instead of 98.
        return {**LAUNCH_OPTIONS, "waves_per_eu": 4}
    most = in_pairs(target, dtype) and rounding == "stochastic" and len(rule.coefs) == 3 and not rule.direct
    most = most or (distribution == "lowrank" and rule.name != "axpy")
    return {**LAUNCH_OPTIONS, "maxnreg": 128} if most and _nvidia(target) else LAUNCH_OPTIONS


def chain_options(target: Any, distribution: str) -> dict[str, object]:
    """The same of a chain, whose stages' numbers are all read at run time."""
    most = distribution == "lowrank"
    return {**LAUNCH_OPTIONS, "maxnreg": 168} if most and _nvidia(target) else LAUNCH_OPTIONS


def constants(rule: Rule) -> dict[str, object]:
    """What the kernel is compiled for, of a rule."""
    return {
        "RULE": rule.name,
        "A": "none" if "A" not in rule.coefs else "direct" if rule.direct else "sum",
        "HAS_G": "G" in rule.coefs,
        "HAS_V": "V" in rule.coefs,
        "NUM_SHARED": len(rule.scalars),
        "STATES": len(rule.states),
    }


Launch = tuple[int, dict[str, Any]]  # programs, and arguments of the kernel


def launches(table: Table, direction: Direction, seeds: list[Tensor]) -> Iterator[Launch]:
    """One for a table, or one for each piece of one with factors, which are made before it. seeds: of all stages."""
    count = sum(map(Tensor.numel, seeds))
    if table.factors is None or count == 0:
        dense = "normal" if rank(direction) else direction.name
        nothing = dict.fromkeys(("factor_rows", "values", "of_seed", "rank", "first_chunk"))
        yield table.chunks.shape[0], {"DISTRIBUTION": dense, **nothing}
        return
    # One launch fills all of a chain's.
    together = seeds if len(seeds) == 1 else [torch.cat(seeds)]
    for (_, chunks, num_chunks), (_, values, of_seed, of_rank) in factored.pieces(table, table.factors, together, fill):
        yield (
            num_chunks,
            {
                "DISTRIBUTION": "lowrank",
                "factor_rows": table.factors.rows,
                "values": values,
                "of_seed": of_seed,
                "rank": of_rank if of_rank > 1 else None,
                "first_chunk": (chunks - table.chunks.data_ptr()) // 8,
            },
        )


def fill(factors: FactorTable, piece: Piece, seeds: Tensor, address: int) -> None:
    """The factors of these seeds, which are on the device, to the address."""
    begin, end = piece.sides
    with _launch_context(factors.sides.device):
        fill_kernel[((end - begin) * seeds.numel(),)](
            factors.sides,
            factors.side_chunks,
            seeds,
            address - 4 * piece.places[0],
            piece.of_seed,
            begin,
            end - begin,
            factors.scale,
            CHUNK=CHUNK,
            BLOCK=block(current_target()),
            **LAUNCH_OPTIONS,
        )


def run(table: Table, spec: PassSpec, numbers: PassNumbers) -> None:
    """One pass over a table (passes/table.py). All tensors are contiguous, on its device, and checked by the caller."""
    num_seeds = numbers.seeds.shape[0]
    if table.chunks.shape[0] == 0:
        return
    device = table.tensors.device
    stochastic_state = table.state_dtype != torch.float32 and spec.rule.written > 0
    for num_chunks, directions in launches(table, spec.direction, [numbers.seeds]):
        with _launch_context(device):
            target, distribution = current_target(), directions["DISTRIBUTION"]
            pass_kernel[(num_chunks,)](
                table.tensors,
                table.chunks,
                numbers.seeds,
                numbers.coefs,
                numbers.shared,
                numbers.rounding_seed if spec.rounding == "stochastic" or stochastic_state else None,
                numbers.enabled,
                num_seeds,
                **directions,
                **constants(spec.rule),
                WRITTEN=min(spec.rule.written, 1) if spec.keep_second else spec.rule.written,
                SQUARE_OF_SUM=spec.square_of_sum,
                DTYPE=DTYPES[table.dtype],
                STATE=DTYPES[table.state_dtype],
                ROUNDING=spec.rounding,
                HAS_NOISE=num_seeds > 0,
                COLUMNS=COLUMNS,
                CHUNK=CHUNK,
                BLOCK=block(target),
                APART=apart(target, table.dtype, distribution),
                **of_target(target, table.dtype),
                **options(target, spec.rule, table.dtype, spec.rounding, distribution),
            )
    if on_gpu(device):
        table.read_on(torch.cuda.current_stream(device))


def run_chain(table: Table, chain: Chain) -> None:
    """A chain over a table, in one launch for each piece; the stages' addresses go along in a table of their own."""
    if table.chunks.shape[0] == 0:
        return
    device = table.tensors.device
    there, parcel = chain_on_device(chain, device, room=len(chain.stages) * STAGE_COLUMNS * 8)
    rows = torch.tensor(stage_rows(there), dtype=torch.int64, device="cpu")
    # Not where a stage's factors are, but how many seeds come before its own: the same for each piece.
    rows[:, -1] = rows[:, 4].cumsum(0) - rows[:, 4]
    stages = parcel.send(rows)
    for num_chunks, directions in launches(table, chain.stages[0][0].direction, there.seeds):
        with _launch_context(device):
            target = current_target()
            chain_kernel[(num_chunks,)](
                table.tensors,
                table.chunks,
                stages,
                there.enabled,
                len(chain.stages),
                **directions,
                **constants(chain.rule),
                PERTURBATION=rule_of_probes(chain.rule).name,
                WRITTEN=chain.rule.written,
                KEEP_SECOND=chain.keep_second,
                FORK=chain.fork,
                DTYPE=DTYPES[table.dtype],
                STATE=DTYPES[table.state_dtype],
                COLUMNS=COLUMNS,
                PROBE=PROBE,
                STAGE_COLUMNS=STAGE_COLUMNS,
                CHUNK=CHUNK,
                BLOCK=block(target),
                **of_target(target, table.dtype),
                **chain_options(target, directions["DISTRIBUTION"]),
            )
    if on_gpu(device):
        table.read_on(torch.cuda.current_stream(device))
