"""Per-element arithmetic of the rules in Triton: what csrc/rules.h has in C++, in the same order of operations.

A rule gets the decayed weight w (with A on it already where the rule is direct), the sums a, g, v over the directions, its
states x and y, and its group's scalars p1 .. p6 after the decay. Equations and sources: docs/methods.md.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import struct

import triton
import triton.language as tl

from .packed import fma, mul


def _f32(pattern: int) -> tl.constexpr:
    return tl.constexpr(struct.unpack("<f", struct.pack("<I", pattern))[0])


Q0, Q1, Q2, Q3 = _f32(0x3E8CC5E4), _f32(0x3EA0BB6E), _f32(0x3EBFFFB3), _f32(0x3EFFFFC9)


@triton.jit
def inverse_root(x, PACKED: tl.constexpr):
    """1/sqrt(x) for normal x > 0, at most 1e-7 off, exactly 1 for 1; finite for x = 0."""
    y = (0x5F374740 - (x.to(tl.uint32, bitcast=True) >> 1)).to(tl.float32, bitcast=True)
    e = fma(-mul(x, y, PACKED), y, 1.0, PACKED)
    q = fma(e, Q0, Q1, PACKED)
    q = fma(q, e, Q2, PACKED)
    q = fma(q, e, Q3, PACKED)
    return fma(mul(y, e, PACKED), q, y, PACKED)


@triton.jit
def inverse(x, PACKED: tl.constexpr):
    """1/x for 1e-37 < x < 1e37, at most 6e-8 off."""
    y = (0x7EF311C0 - x.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    for _ in tl.static_range(3):
        y = fma(y, fma(-x, y, 1.0, PACKED), y, PACKED)
    return y


@triton.jit
def start_of_squares(p1, p2, RULE: tl.constexpr):
    """What V starts from."""
    if RULE == "hizoo" or RULE == "hizoo_restore":
        start = -p1
    elif RULE == "adamezo":
        start = p2
    else:
        start = 0.0
    return start


@triton.jit
def finish(w, a, g, v, x, y, p1, p2, p3, p4, p5, p6, RULE: tl.constexpr, PACKED: tl.constexpr):
    """The new weight, before its rounding, and the new states."""
    if RULE == "scaled_axpy":
        w = fma(a, inverse_root(x, PACKED), w, PACKED)
    elif RULE == "hizoo" or RULE == "hizoo_restore":
        if RULE == "hizoo_restore":
            w = fma(a, inverse_root(x, PACKED), w, PACKED)
        x = fma(x, v, x, PACKED)
        x = tl.minimum(tl.maximum(x, 2.0**-64), 2.0**64)
        w = fma(g, inverse_root(x, PACKED), w, PACKED)
    elif RULE == "helene":
        x = fma(x, p1, g, PACKED)
        y = fma(y, p2, v, PACKED)
        below = fma(tl.maximum(y, p5), p4, p6, PACKED)
        w = fma(mul(x, p3, PACKED), inverse(below, PACKED), w, PACKED)
    elif RULE == "momentum":
        x = fma(x, p1, g, PACKED)
        w = fma(x, p2, w, PACKED)
    elif RULE == "adam":
        x = fma(x, p1, g, PACKED)
        y = fma(mul(g, p3, PACKED), g, mul(y, p2, PACKED), PACKED)
        below = fma(y, inverse_root(y, PACKED), p5, PACKED)
        w = fma(mul(x, p4, PACKED), inverse(below, PACKED), w, PACKED)
    elif RULE == "adamezo":
        w = fma(mul(g, p1, PACKED), inverse_root(v, PACKED), w, PACKED)
    elif RULE == "sign":
        w = w + tl.where(g < 0.0, p1 * -1.0, tl.where(g > 0.0, p1, 0.0))
    return w, x, y
