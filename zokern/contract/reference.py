"""The executable specification: the noise contract `zk1` and every rule in NumPy, slow and obvious.

Every other backend is tested against this file with `torch.equal`, and nothing here is used for speed. z is a pure
function of (seed, tensor id, global element index); a pass computes in float32 and rounds once to the storage type.
Sources: Salmon et al. 2011 (Philox4x32-10), Box and Muller 1958. Seeds are in streams.py. See docs/noise.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zokern._checks import check_choice
from zokern.contract.streams import (
    PURPOSE_LEFT,
    PURPOSE_NORMAL,
    PURPOSE_RADEMACHER,
    PURPOSE_RIGHT,
    PURPOSE_ROUNDING,
    ROUNDINGS,
    derive_seed,
    matrices,
    rank_of,
    splitmix64,
)

__all__ = [
    "add_noise",
    "derive_seed",
    "factors",
    "fma",
    "noise",
    "normal_pair",
    "philox",
    "round_bf16",
    "round_fp16",
    "round_to",
    "rounding_bits",
    "splitmix64",
    "widen",
]

Array = npt.NDArray[Any]
STORED = ("float32", "float16", "bfloat16")

# Coefficients of the contract, as float32 bit patterns so that no decimal parser takes part.
P_COEFS = ("bd002f20", "3e94d03b", "bf91a12f", "401e51d6", "c03630f9", "3fa02ce3")  # mantissa part of -ln
LN2_SCALE = "b3b17218"  # -ln(2) * 2^-23, per unit of e
G_COEFS = ("407b6a77", "c0bc39e4", "407d6a5a")  # refines 1/sqrt
C_COEFS = ("c1a89d40", "426b2d19", "c2aa8b78", "4281db82", "c19de970", "3f7ffff3")  # cos(2 pi t) in t^2
D_COEFS = ("42032028", "c294f4bd", "42a2bbcf", "c225532a", "40c90ecb")  # sin(2 pi t) / t in t^2


def _f32(pattern: str) -> Any:
    return np.uint32(int(pattern, 16)).view(np.float32)


def _bits(x: Array) -> Array:
    return np.asarray(x, np.float32).view(np.uint32)


def _as_float(bits: Array) -> Array:
    return np.asarray(bits, np.uint32).view(np.float32)


# ---------------------------------------------------------------------------------------------------------- arithmetic


def fma(a: Any, b: Any, c: Any) -> Array:
    """float32 fused multiply-add, correctly rounded for every input.

    The product of two float32 is exact in float64. Their sum with c is rounded to odd (Boldo and Melquiond 2008),
    after which the rounding to float32 cannot be a double rounding.
    """
    with np.errstate(all="ignore"):
        p = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32).astype(np.float64)
        c64 = np.asarray(c, np.float32).astype(np.float64)
        s = p + c64
        cc = s - p
        error = (p - (s - cc)) + (c64 - cc)  # Knuth's TwoSum: s + error == p + c exactly
        inexact = np.isfinite(s) & (error != 0) & ((s.view(np.int64) & 1) == 0)
        away = (error > 0) == (s > 0)  # the true value lies further from zero than s
        odd = (s.view(np.int64) + np.where(away, 1, -1)).view(np.float64)
        return np.where(inexact, odd, s).astype(np.float32)


# --------------------------------------------------------------------------------------------------------------- words


def philox(c0: Any, c1: Any, c2: Any, c3: Any, seed: int) -> Array:
    """Philox4x32-10: counter words (any broadcastable shapes) and a 63-bit seed to uint32 words [..., 4]."""
    low = np.uint64(0xFFFFFFFF)
    c = [x.astype(np.uint64) for x in np.broadcast_arrays(*(np.asarray(x, np.uint64) for x in (c0, c1, c2, c3)))]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            p0 & low,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=-1).astype(np.uint32)


def normal_pair(word: Any) -> tuple[Array, Array]:
    """One 32-bit word to two independent standard normals (Box-Muller; section 2 of the contract)."""
    w = np.atleast_1d(np.asarray(word, np.uint32))
    x = w * np.uint32(0x915F77F5)
    xf = x.astype(np.float32) + np.float32(0.5)
    e = (_bits(xf) - np.uint32(0x4F800000)).view(np.int32).astype(np.float32)
    m = _as_float((_bits(xf) & np.uint32(0x007FFFFF)) | np.uint32(0x3F800000))
    p = np.full_like(m, _f32(P_COEFS[0]))
    for coef in P_COEFS[1:]:
        p = fma(p, m, _f32(coef))
    h = fma(e, _f32(LN2_SCALE), p)  # -ln((x + 1/2) / 2^32)
    y = _as_float(np.uint32(0x5EEC0000) - (_bits(h) >> np.uint32(1)))  # 1/sqrt(2h), 4 % off
    s = h * y
    v = s * y
    g = fma(fma(v, _f32(G_COEFS[0]), _f32(G_COEFS[1])), v, _f32(G_COEFS[2]))
    r = s * g  # sqrt(2h)
    t = w.view(np.int32).astype(np.float32) * np.float32(2.0**-32)  # the angle in turns, in [-1/2, 1/2]
    q = t * t
    c = np.full_like(t, _f32(C_COEFS[0]))
    for coef in C_COEFS[1:]:
        c = fma(c, q, _f32(coef))
    d = np.full_like(t, _f32(D_COEFS[0]))
    for coef in D_COEFS[1:]:
        d = fma(d, q, _f32(coef))
    return r * c, r * (d * t)


def _block_words(first: int, last: int, seed: int, tensor_id: int, purpose: int) -> Array:
    """Words of the blocks first .. last-1, shape (blocks, 4)."""
    b = np.arange(first, last, dtype=np.uint64)
    return philox(b & np.uint64(0xFFFFFFFF), b >> np.uint64(32), tensor_id, purpose, seed)


def _normals(n: int, seed: int, tensor_id: int, offset: int, purpose: int) -> Array:
    first, last = offset >> 3, (offset + n + 7) >> 3
    words = _block_words(first, last, seed, tensor_id, purpose)
    z = np.stack(normal_pair(words.reshape(-1)), axis=-1).reshape(-1)
    return np.asarray(z[offset - 8 * first :][:n])


def noise(
    n: int, seed: int, tensor_id: int, offset: int = 0, distribution: str = "normal", shape: Sequence[int] | None = None
) -> Array:
    """z for the n elements whose global indices start at `offset`, float32: N(0, 1), signs for "rademacher", or products of
    factors for "lowrank:R". shape: of the whole tensor, which a low-rank direction depends on; None is [n].
    """
    found = matrices((n,) if shape is None else shape, rank_of(distribution))
    if found is not None:
        return _products(n, factors(found, rank_of(distribution), seed, tensor_id), found, offset)
    if distribution == "rademacher":
        first, last = offset >> 7, (offset + n + 127) >> 7
        words = _block_words(first, last, seed, tensor_id, PURPOSE_RADEMACHER)
        bits = (words[:, :, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
        z = np.where(bits.reshape(-1) == 0, np.float32(1), np.float32(-1))
        return np.asarray(z[offset - 128 * first :][:n])
    return _normals(n, seed, tensor_id, offset, PURPOSE_NORMAL)


# ------------------------------------------------------------------------------------------------------------ low rank


def factor(x: Array) -> Array:
    """float32 to the nearest number that float32, bfloat16 and float16 all hold: a multiple of 2^-24 of 8 significant bits,
    ties to even. Below 2^-17 all such multiples have fewer bits; from there on numbers of 8 bits are such multiples."""
    x = np.where(np.abs(x) < np.float32(2.0**-17), (x + np.float32(0.75)) - np.float32(0.75), x)
    return _as_float(round_bf16(x).astype(np.uint32) << np.uint32(16))


def factors(stack: tuple[int, int, int], rank: int, seed: int, tensor_id: int) -> tuple[Array, Array]:
    """U [rank, E*m] and V [rank, E*n] of a stack of E matrices [m, n]: normals, those of U times 1/sqrt(rank), rounded.

    They are numbered row by row of these shapes. z of matrix e is sum_k U[k, e*m + i] V[k, e*n + j], a product first and
    then fused multiply-adds in the order of k.
    """
    count, rows, columns = stack
    scale = np.float32(1.0 / np.sqrt(np.float64(rank)))
    left = factor(_normals(rank * count * rows, seed, tensor_id, 0, PURPOSE_LEFT) * scale)
    right = factor(_normals(rank * count * columns, seed, tensor_id, 0, PURPOSE_RIGHT))
    return left.reshape(rank, -1), right.reshape(rank, -1)


def _products(n: int, of: tuple[Array, Array], stack: tuple[int, int, int], offset: int) -> Array:
    """z of the elements from `offset` on."""
    _, rows, columns = stack
    index = np.arange(offset, offset + n)
    row, column = index // columns, index % columns
    left, right = of[0][:, row], of[1][:, row // rows * columns + column]
    z = left[0] * right[0]
    for u, v in zip(left[1:], right[1:], strict=True):
        z = fma(u, v, z)
    return np.asarray(z)


def rounding_bits(n: int, seed: int, tensor_id: int, offset: int = 0) -> Array:
    """The 16 random bits, as uint32, that round each of n elements."""
    first, last = offset >> 3, (offset + n + 7) >> 3
    words = _block_words(first, last, seed, tensor_id, PURPOSE_ROUNDING)
    halves = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=-1)
    return np.asarray(halves.reshape(-1)[offset - 8 * first :][:n])


# ------------------------------------------------------------------------------------------------------------ rounding


def round_bf16(x: Array, random: Array | None = None) -> Array:
    """float32 to bfloat16 bits (uint16): nearest even, or stochastic: add 16 random bits, truncate. NaN stays NaN."""
    bits = _bits(x)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    add = (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) if random is None else random.astype(np.uint32)
    rounded = (bits + add) >> np.uint32(16)
    return np.asarray(np.where(nan, np.uint32(0x7FC0), rounded)).astype(np.uint16)


def round_fp16(x: Array, random: Array | None = None) -> Array:
    """float32 to float16 bits (uint16), nearest even or stochastic.

    Stochastic: |x| as a fixed-point number in units of float16's last place with 16 fractional bits (further bits are
    cut), plus 16 random bits, shifted right by 16. A subnormal result drops more bits, which the shift follows.
    P(up) is exact while |x| >= 2^-17 and within 2^-16 of it below. Overflow is as in rounding to nearest even.
    """
    bits = _bits(x)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    mag = bits & np.uint32(0x7FFFFFFF)
    if random is None:
        with np.errstate(over="ignore"):
            half = _as_float(mag).astype(np.float16).view(np.uint16).astype(np.uint32)
    else:
        e = (mag >> np.uint32(23)).astype(np.int64)
        m = np.where(e == 0, mag, (mag & np.uint32(0x7FFFFF)) | np.uint32(0x800000)).astype(np.int64)
        e = np.maximum(e, 1)
        dropped = 13 + np.maximum(0, 113 - e)  # low bits of m below float16's last place
        fixed = np.where(
            dropped <= 16, m << np.maximum(16 - dropped, 0), m >> np.minimum(np.maximum(dropped - 16, 0), 31)
        )
        q = (fixed + random.astype(np.int64)) >> 16
        half = ((np.maximum(e, 113) - 113) << 10) + q  # q carries the hidden bit into the exponent field
        half = np.where(mag < 0x477FF000, np.minimum(half, 0x7BFF), 0x7C00)  # 0x477ff000 is 65520
    half = np.where(mag > np.uint32(0x7F800000), 0x7E00, half)
    return np.asarray(half.astype(np.uint32) | sign).astype(np.uint16)


def round_to(x: Array, dtype: str, rounding: str = "nearest", random: Array | None = None) -> Array:
    """Rounds float32 to `dtype` ("float32", "float16", "bfloat16"): float32, or the uint16 bits of a 16-bit type."""
    check_choice(dtype, "dtype", STORED)
    check_choice(rounding, "rounding", ROUNDINGS)
    if dtype == "float32":
        return np.asarray(x, np.float32)
    bits = random if rounding == "stochastic" else None
    return round_bf16(x, bits) if dtype == "bfloat16" else round_fp16(x, bits)


def widen(x: Array, dtype: str) -> Array:
    """The inverse view of `round_to`: float32 values of float32, or of the uint16 bits of a 16-bit type (exact)."""
    check_choice(dtype, "dtype", STORED)
    if dtype == "float32":
        return np.asarray(x, np.float32)
    if dtype == "bfloat16":
        return _as_float(x.astype(np.uint32) << np.uint32(16))
    with np.errstate(invalid="ignore"):  # of a signalling NaN, which numpy tells of on Arm alone
        return x.view(np.float16).astype(np.float32)


# --------------------------------------------------------------------------------------------------------------- rules


def add_noise(
    src: Array,
    *,
    dtype: str,
    tensor_id: int,
    seeds: Sequence[int],
    coefs: Sequence[float],
    decay: float = 1.0,
    distribution: str = "normal",
    rounding: str = "nearest",
    rounding_seed: int = 0,
    offset: int = 0,
    shape: Sequence[int] | None = None,
) -> Array:
    """One flat tensor's pass round(decay*src + sum_k coef_k z(seed_k)); storage as in `round_to`, shape as in `noise`."""
    n = len(src)
    with np.errstate(invalid="ignore"):
        acc = np.float32(decay) * widen(src, dtype)
    for seed, coef in zip(seeds, coefs, strict=True):
        acc = fma(np.float32(coef), noise(n, seed, tensor_id, offset, distribution, shape), acc)
    random = rounding_bits(n, rounding_seed, tensor_id, offset) if rounding == "stochastic" else None
    return round_to(acc, dtype, rounding, random)
