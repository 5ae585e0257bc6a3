"""Seeds of a run's directions, and the noise itself as a tensor.

z is a pure function of (seed, tensor id, element index): the same bits on every backend and machine (docs/noise.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zokern import _checks
from zokern.contract.streams import LAYERS_STREAM, ROUNDING_STREAM, STATE_STREAM, derive_seed, derive_seeds
from zokern.directions import Direction

__all__ = ["LAYERS_STREAM", "ROUNDING_STREAM", "STATE_STREAM", "derive_seed", "derive_seeds", "noise"]


def noise(
    shape: int | Sequence[int],
    *,
    seed: int,
    tensor_id: int = 0,
    distribution: str | Direction = "normal",
    offset: int = 0,
    stride: int = 0,
    whole: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """z as a tensor: the noise that a pass adds to the tensor `tensor_id` under `seed`.

    Args:
        shape: of the result; elements are numbered in row-major order.
        seed: of the direction, in [0, 2^63).
        tensor_id: in [0, 2^32).
        distribution: "normal" for N(0, 1), "rademacher" for signs +1 and -1, "lowrank:4" or zokern.LowRank(4) for matrices
            U V^T / sqrt(4).
        offset: global index of the first element, for a shard of a larger tensor.
        stride: global distance between the starts of neighbouring rows, for a shard of a matrix along its last dimension:
            the size of a row of the whole matrix. 0 for what is no such shard.
        whole: shape of the tensor that this is a shard of, which a direction of low rank depends on; None is `shape`.
        dtype: float32, or float16 / bfloat16: the float32 noise rounded to nearest even.
        device, backend: as in `zokern.add_noise_`.

    Raises:
        TypeError, ValueError: naming the argument and its range.
    """
    if not isinstance(shape, (int, Sequence)):
        raise TypeError(f"shape must be an int or a sequence of ints, got {type(shape).__name__}")
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    for i, size in enumerate(sizes):
        _checks.check_integer(size, f"shape[{i}]", 1, _checks.MAX_INDEX)
    _checks.check_integer(math.prod(sizes), "shape's product", 1, _checks.MAX_INDEX)
    if dtype not in _checks.DTYPES:
        raise TypeError(f"dtype is {dtype}; noise is made in float32, float16 or bfloat16")
    from zokern.ops import add_noise_

    z = torch.zeros(sizes, dtype=dtype, device=device)
    add_noise_(
        [z],
        tensor_ids=[tensor_id],
        seeds=[seed],
        coefs=[1.0],
        distribution=distribution,
        offsets=[offset],
        strides=[stride],
        shapes=None if whole is None else [whole],
        backend=backend,
    )
    return z
