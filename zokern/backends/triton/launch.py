"""Launches the Triton pass: one kernel launch for all tensors of a call, on the stream current on their device.

Seeds, coefficients, decays and the `enabled` flag stay in device memory, so a launch never synchronises and can be
captured in a CUDA graph. Nothing is autotuned: the kernel works in place and a trial run would change the weights.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

from zokern.table import CHUNK

from .interpreter import exact_arithmetic
from .kernels import add_noise_kernel

NUM_WARPS = 4
BLOCK = (64 if torch.version.hip else 32) * NUM_WARPS  # noise blocks (8 elements) per tile: one per thread
INTERPRETED = not isinstance(add_noise_kernel, triton.JITFunction)
# No contraction of a*b + c, and no overflow checks under TRITON_DEBUG: the noise's integers wrap around on purpose.
LAUNCH_OPTIONS = {"num_warps": NUM_WARPS, "num_stages": 1, "enable_fp_fusion": False, "sanitize_overflow": False}
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _launch_context(device: torch.device) -> AbstractContextManager[object]:
    if INTERPRETED:
        return exact_arithmetic()
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def add_noise(
    tensors: torch.Tensor,
    chunks: torch.Tensor,
    seeds: torch.Tensor,
    coefs: torch.Tensor,
    decays: torch.Tensor,
    rounding_seed: torch.Tensor | None,
    enabled: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    distribution: str,
    rounding: str,
) -> None:
    """dst <- round(decay[g]*src + sum_k coef[g,k] z(seed_k)) for every chunk of the table; g is the tensor's group.

    tensors        int64 [T, 8]: numel, offset, tensor id, group, aligned, src address, dst address, 0
    chunks         int32 [C, 2]: row of `tensors`, chunk number c: global indices [c*CHUNK, (c+1)*CHUNK)
    seeds          int64 [K], each in [0, 2^63); K may be 0
    coefs, decays  float32 [G, K] and [G]
    rounding_seed  int64 [1], read where rounding is "stochastic"
    enabled        int32 [1] or None: a zero makes the pass write nothing
    dtype          of src and dst: float32, float16 or bfloat16 ("stochastic" never comes with float32)
    distribution   "normal" or "rademacher"

    All arguments are contiguous and on one device, and the caller has checked them. Arithmetic is float32, one fused
    multiply-add per direction in the order of `seeds`, one rounding at the end.
    """
    num_chunks, num_seeds = chunks.shape[0], seeds.shape[0]
    if num_chunks == 0:
        return
    with _launch_context(tensors.device):
        add_noise_kernel[(num_chunks,)](
            tensors,
            chunks,
            seeds,
            coefs,
            decays,
            rounding_seed if rounding == "stochastic" else None,
            enabled,
            num_seeds,
            DTYPE=DTYPES[dtype],
            DISTRIBUTION=distribution,
            ROUNDING=rounding,
            HAS_NOISE=num_seeds > 0,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            **LAUNCH_OPTIONS,
        )
