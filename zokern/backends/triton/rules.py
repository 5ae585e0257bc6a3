"""Per-element arithmetic of the rules in Triton: what csrc/rules.h has in C++, in the same order of operations.

A rule gets the decayed weight w (with A on it already where the rule is direct), the sums a, g, v over the directions, its
states x and y, and its group's scalars p1 .. p6 after the decay. Equations and sources: docs/methods.md.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import struct

import triton
import triton.language as tl


def _f32(pattern: int) -> tl.constexpr:
    return tl.constexpr(struct.unpack("<f", struct.pack("<I", pattern))[0])


Q0, Q1, Q2, Q3 = _f32(0x3E8CC5E4), _f32(0x3EA0BB6E), _f32(0x3EBFFFB3), _f32(0x3EFFFFC9)

# The rules that `finish` has; launch.py compares them with zokern/contract/rules.py.
SERVED = ("axpy", "scaled_axpy", "hizoo", "hizoo_restore", "helene", "momentum", "adam", "adamezo", "sign")


@triton.jit
def inverse_root(x):
    """1/sqrt(x) for normal x > 0, at most 1e-7 off, exactly 1 for 1; finite for x = 0."""
    y = (0x5F374740 - (x.to(tl.uint32, bitcast=True) >> 1)).to(tl.float32, bitcast=True)
    e = tl.fma(-(x * y), y, 1.0)
    q = tl.fma(e, Q0, Q1)
    q = tl.fma(q, e, Q2)
    q = tl.fma(q, e, Q3)
    return tl.fma(y * e, q, y)


@triton.jit
def inverse(x):
    """1/x for 1e-37 < x < 1e37, at most 6e-8 off."""
    y = (0x7EF311C0 - x.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    for _ in tl.static_range(3):
        y = tl.fma(y, tl.fma(-x, y, 1.0), y)
    return y


@triton.jit
def start_of_squares(p1, p2, RULE: tl.constexpr):
    """What V starts from, 0 also where there is none."""
    if RULE == "hizoo" or RULE == "hizoo_restore":
        start = -p1
    elif RULE == "adamezo":
        start = p2
    elif (
        RULE == "helene"
        or RULE == "axpy"
        or RULE == "scaled_axpy"
        or RULE == "momentum"
        or RULE == "adam"
        or RULE == "sign"
    ):
        start = 0.0
    else:
        tl.static_assert(False, "start_of_squares does not know the rule " + RULE)
    return start


@triton.jit
def finish(w, a, g, v, x, y, p1, p2, p3, p4, p5, p6, RULE: tl.constexpr, HAS_NOISE: tl.constexpr):
    """The new weight, before its rounding, and the new states. HAS_NOISE: there may be directions."""
    if RULE == "axpy":
        pass
    elif RULE == "scaled_axpy":
        w = tl.fma(a, inverse_root(x), w)
    elif RULE == "hizoo" or RULE == "hizoo_restore":
        if RULE == "hizoo_restore":
            w = tl.fma(a, inverse_root(x), w)
        x = tl.fma(x, v, x)
        x = tl.minimum(tl.maximum(x, 2.0**-64), 2.0**64)
        w = tl.fma(g, inverse_root(x), w)
    elif RULE == "helene":
        x = tl.fma(x, p1, g)
        y = tl.fma(y, p2, v)
        w = tl.fma(x * p3, inverse(tl.fma(tl.maximum(y, p5), p4, p6)), w)
    elif RULE == "momentum":
        x = tl.fma(x, p1, g)
        w = tl.fma(x, p2, w)
    elif RULE == "adam":
        x = tl.fma(x, p1, g)
        y = tl.fma(g * p3, g, y * p2)
        w = tl.fma(x * p4, inverse(tl.fma(y, inverse_root(y), p5)), w)
    elif RULE == "adamezo":
        w = tl.fma(g * p1, inverse_root(v), w)
    elif RULE == "sign" and not HAS_NOISE:
        w = tl.where(w == 0.0, 0.0, w)  # w + 0, but no sum of the product w: see packed.py
    elif RULE == "sign":
        w = w + tl.where(g < 0.0, p1 * -1.0, tl.where(g > 0.0, p1, 0.0))
    else:
        tl.static_assert(False, "finish does not know the rule " + RULE)
    return w, x, y
