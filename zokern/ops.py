"""The public pass: check once, pick the backend, launch.

    dst <- round(decay*src + sum_k coef_k z(seed_k))

z is never stored, and everything between reading src and writing dst happens in registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zokern import _checks, directions
from zokern.contract.rules import RULES
from zokern.directions import Direction
from zokern.passes.operands import Operands
from zokern.passes.spec import PassNumbers, PassSpec
from zokern.sweep import run


def _seed_tensor(seeds: Sequence[int] | Tensor) -> Tensor:
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or seeds.dim() != 1:
            raise TypeError(f"seeds must be a 1-D int64 tensor or a list of ints, got {_checks.describe(seeds)}")
        if seeds.device.type == "cpu" and not torch.compiler.is_compiling() and bool((seeds < 0).any()):
            raise ValueError(f"seeds has a negative value; seeds are in [0, {_checks.MAX_SEED}]")
        return seeds
    return torch.tensor(
        [_checks.check_seed(s, f"seeds[{k}]") for k, s in enumerate(seeds)], dtype=torch.int64, device="cpu"
    )


def _coef_tensor(coefs: Sequence[float] | Tensor) -> Tensor:
    if isinstance(coefs, Tensor):
        if coefs.dtype != torch.float32 or coefs.dim() != 1:
            raise TypeError(f"coefs must be a 1-D float32 tensor or a list of floats, got {_checks.describe(coefs)}")
        if coefs.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(coefs.isfinite().all()):
            raise ValueError("coefs has a value that is not finite")
        return coefs
    return torch.tensor(
        [
            _checks.check_number(c, f"coefs[{k}]", -_checks.MAX_FLOAT32, _checks.MAX_FLOAT32)
            for k, c in enumerate(coefs)
        ],
        dtype=torch.float32,
        device="cpu",
    )


def _same_memory(src: Sequence[Tensor], dst: Sequence[Tensor]) -> bool:
    return all(a.data_ptr() == b.data_ptr() for a, b in zip(src, dst, strict=True))


def add_noise_(
    tensors: Sequence[Tensor],
    *,
    tensor_ids: Sequence[int],
    seeds: Sequence[int] | Tensor,
    coefs: Sequence[float] | Tensor,
    decay: float | Tensor = 1.0,
    distribution: str | Direction = "normal",
    rounding: str = "nearest",
    rounding_seed: int | None = None,
    out: Sequence[Tensor] | None = None,
    offsets: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    shapes: Sequence[Sequence[int]] | None = None,
    backend: str = "auto",
) -> None:
    """dst <- round(decay*src + sum_k coefs[k] z(seeds[k])), all tensors in one launch for each dtype.

    Arithmetic is float32: one multiply by decay, one fused multiply-add for each direction in order, one rounding to the
    storage type. The result is the same bits on every backend (docs/noise.md).

    Args:
        tensors: float32, float16 or bfloat16, contiguous, on one device. Changed in place unless `out` is given.
        tensor_ids: one for each tensor, in [0, 2^32): which noise it gets.
        seeds: of the K >= 0 directions, ints in [0, 2^63), or an int64 tensor [K] on the host or the device.
        coefs: one for each seed, finite, or a float32 tensor [K].
        decay: finite, or a float32 tensor with one element.
        distribution: "normal" for N(0, 1), "rademacher" for random signs, "lowrank:4" for matrices of rank 4; or
            zokern.Normal(), zokern.Rademacher(), zokern.LowRank(4).
        rounding: "nearest" (even) or "stochastic" (unbiased; 16-bit tensors only, float32 has nothing to round).
        rounding_seed: of the stochastic rounding, in [0, 2^63). Give every rounding event its own.
        out: where the results go, shaped like `tensors`; None means in place.
        offsets: global index of each tensor's first element, for shards; None means zeros.
        strides: for each tensor, global distance between the starts of neighbouring rows, for shards of a matrix along its
            last dimension: the size of a row of the whole matrix. 0 for other tensors; None means zeros.
        shapes: of each whole tensor, which directions of low rank depend on, for shards and views; None means `tensors`'.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; $ZOKERN_BACKEND sets what "auto" means.

    Raises:
        TypeError, ValueError: before anything is changed, naming the argument, the tensor and the remedy.
        RuntimeError: when the backend asked for cannot run there, with the reason.

    No allocation grows with the tensors, and nothing waits for the device.
    """
    direction = directions.parse(distribution)
    operands = _operands(tensors, tensor_ids, out, offsets, strides, shapes, directions.rank(direction))
    given = _seed_tensor(seeds), _coef_tensor(coefs), _decay_tensor(decay)
    _check_places(*given, operands.src[0].device)
    spec = PassSpec(RULES["axpy"], direction, rounding)
    numbers = _numbers(*given, rounding, rounding_seed)
    with torch.no_grad():
        run(operands, spec, numbers, backend)


def _operands(
    tensors: Sequence[Tensor],
    tensor_ids: Sequence[int],
    out: Sequence[Tensor] | None,
    offsets: Sequence[int] | None,
    strides: Sequence[int] | None,
    shapes: Sequence[Sequence[int]] | None,
    rank: int,
) -> Operands:
    if isinstance(tensors, Tensor):
        raise TypeError("tensors must be a list of tensors; for one tensor t pass [t]")
    src = list(tensors)
    if not src:
        raise ValueError("tensors is empty: there is nothing to add noise to")
    dst = None if out is None else list(out)
    if dst is not None and len(dst) == len(src) and _same_memory(src, dst):
        dst = None
    ids, starts = list(tensor_ids), [0] * len(src) if offsets is None else list(offsets)
    apart = [] if strides is None else list(strides)
    whole = [] if shapes is None else [_shape(shape, f"shapes[{i}]") for i, shape in enumerate(shapes)]
    for name, given in (
        ("tensor_ids", ids),
        ("offsets", starts),
        ("strides", None if strides is None else apart),
        ("shapes", None if shapes is None else whole),
        ("out", dst),
    ):
        if given is not None and len(given) != len(src):
            raise ValueError(
                f"{name} has {len(given)} entries and tensors has {len(src)}; one for each tensor is needed"
            )
    operands = Operands(src, dst, [], ids, starts, [0] * len(src), strides=apart, rank=rank, shapes=whole)
    operands.check()
    return operands


def _shape(shape: Sequence[int], name: str) -> tuple[int, ...]:
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise TypeError(f"{name} must be a sequence of ints, got {type(shape).__name__}")
    return tuple(_checks.check_integer(n, f"{name}[{i}]", 0, _checks.MAX_INDEX) for i, n in enumerate(shape))


def _decay_tensor(decay: float | Tensor) -> Tensor:
    if not isinstance(decay, Tensor):
        value = _checks.check_number(decay, "decay", -_checks.MAX_FLOAT32, _checks.MAX_FLOAT32)
        return torch.tensor([value], dtype=torch.float32, device="cpu")
    if decay.dtype != torch.float32 or decay.numel() != 1:
        raise TypeError(f"decay must be a number or a float32 tensor with one element, got {_checks.describe(decay)}")
    return decay.reshape(1)


def _check_places(seeds: Tensor, coefs: Tensor, decay: Tensor, device: torch.device) -> None:
    if seeds.shape != coefs.shape:
        raise ValueError(f"seeds has {seeds.numel()} entries and coefs has {coefs.numel()}; they go in pairs")
    for name, t in (("seeds", seeds), ("coefs", coefs), ("decay", decay)):
        if t.device.type != "cpu" and t.device != device:
            raise ValueError(f"{name} is on {t.device}, tensors on {device}; put it there or on the CPU")
        if t.device.type != "cpu" and device.type == "cpu":
            raise ValueError(f"{name} is on {t.device}, tensors on the CPU")


def _numbers(seeds: Tensor, coefs: Tensor, decay: Tensor, rounding: str, rounding_seed: int | None) -> PassNumbers:
    if (rounding == "stochastic") != (rounding_seed is not None):
        raise ValueError(
            f"rounding is {rounding!r} and rounding_seed is {rounding_seed}; stochastic rounding needs a seed of its own, "
            "and nearest takes none"
        )
    rounding_tensor = None
    if rounding_seed is not None:
        rounding_tensor = torch.tensor(
            [_checks.check_seed(rounding_seed, "rounding_seed"), 0], dtype=torch.int64, device="cpu"
        )
    return PassNumbers(seeds, coefs.reshape(1, 1, -1), decay.reshape(1, 1), rounding_tensor)
