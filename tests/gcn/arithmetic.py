"""What the vector instructions compute, where it is more than an operator: arrays in, arrays out."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx.parse import PtxError

u2, u4, u8, i4 = np.uint16, np.uint32, np.uint64, np.int32
f2, f4 = np.float16, np.float32
TINY = np.finfo(f4).smallest_normal


def _signaling(x: Any) -> Any:
    return (x != x) & ((x.view(u4) & u4(0x400000)) == 0)


def maximum(a: Any, b: Any) -> Any:
    """Of a number and a quiet NaN the number; +0 above -0."""
    r = np.where(a == b, (a.view(u4) & b.view(u4)).view(f4), np.fmax(a, b))
    return np.where(_signaling(a) | _signaling(b), f4(np.nan), r)


def minimum(a: Any, b: Any) -> Any:
    r = np.where(a == b, (a.view(u4) | b.view(u4)).view(f4), np.fmin(a, b))
    return np.where(_signaling(a) | _signaling(b), f4(np.nan), r)


def med3(a: Any, b: Any, c: Any) -> Any:
    """The middle one; of a NaN and others their least."""
    nan = (a != a) | (b != b) | (c != c)
    middle = maximum(minimum(a, b), minimum(maximum(a, b), c))
    return np.where(nan, minimum(minimum(a, b), c), middle)


def reciprocal(x: Any) -> Any:
    """1/x, rounded down or up as x's bits have it: the hardware promises one unit in the last place, and takes subnormals,
    of x or of the result, for zeros."""
    x = np.where(np.abs(x) < TINY, np.copysign(f4(0), x), x)
    y = f4(1) / x
    y = np.where(np.abs(y) < TINY, np.copysign(f4(0), y), y)
    with np.errstate(invalid="ignore"):
        rest = np.float64(1) - x.astype(np.float64) * y.astype(np.float64)  # exact
    below = (rest > 0) == (x > 0)  # y, of 1/x
    other = (y.view(i4) + np.where(below == (y > 0), i4(1), i4(-1))).view(f4)
    chosen = np.isfinite(x) & np.isfinite(y) & (y != 0) & (rest != 0) & ((x.view(u4) * u4(0x9E3779B9) >> u4(31)) != 0)
    return np.where(chosen, other, y)


def to_unsigned(x: Any) -> Any:
    """Toward zero; what does not fit is the nearest that does, a NaN 0."""
    return np.where(x > 0, np.minimum(np.trunc(x.astype(np.float64)), 4294967295.0), 0).astype(u4)


def to_bf16(x: Any) -> Any:
    b = x.view(u4)
    even = u4(0x7FFF) + (b >> u4(16) & u4(1))
    return np.where(x != x, u4(0x7FC0), b + even >> u4(16))


def to_f16(x: Any) -> Any:
    return x.astype(f2).view(u2).astype(u4)


def permute(a: Any, b: Any, selector: Any) -> Any:
    """Bytes of a:b, b's the lower ones; 12 is 0, from 13 on 0xff."""
    picks = [selector >> u4(8 * n) & u4(0xFF) for n in range(4)]
    if any(((pick > 7) & (pick < 12)).any() for pick in picks):
        raise PtxError("v_perm_b32 of a sign")
    both, r = a.astype(u8) << u8(32) | b, u4(0)
    for n, pick in enumerate(picks):
        byte = (both >> ((pick & u4(7)) << u4(3)).astype(u8)).astype(u4) & u4(0xFF)
        r = r | np.where(pick < 8, byte, np.where(pick == 12, u4(0), u4(0xFF))) << u4(8 * n)
    return r


def shift_and_add(a: Any, b: Any, c: Any) -> Any:
    """64 bits; the hardware shifts by 4 at most."""
    if np.any(b > u4(4)):
        raise PtxError("v_lshl_add_u64 by more than 4")
    return (a << b.astype(u8)) + c


def field(x: Any, at: Any, width: Any) -> Any:
    return x >> (at & u4(31)) & ((u4(1) << (width & u4(31))) - u4(1))


def signed_field(x: Any, at: Any, width: Any) -> Any:
    """A width of 0 is 0."""
    width, at = width & u4(31), at & u4(31)
    up = np.minimum(u4(32) - width, u4(31)).view(i4)
    moved = (x >> at.view(i4)) << up >> up
    return np.where(width == 0, i4(0), moved)
