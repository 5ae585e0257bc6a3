"""The one rounding of a pass: float32 to float32, float16 or bfloat16, to nearest even or stochastic, in Triton.

Stochastic rounding is unbiased and takes 16 random bits r per element (`noise.rounding_bits`). An infinity stays itself
and a NaN stays a NaN. bfloat16: add r to the float's bit pattern, truncate. float16: |x| as a fixed-point number in
units of float16's last place with 16 fractional bits (further bits are cut), plus r, shifted right by 16; overflow is
that of rounding to nearest even, so a carry never makes an infinity of a value below 65520. See docs/noise.md.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _stochastic_bf16(x, random):
    bits = x.to(tl.uint32, bitcast=True)
    rounded = tl.where(x == x, bits + random, 0x7FC00000)  # a carry could turn a NaN into a zero
    return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _stochastic_fp16(x, random):
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    exponent = magnitude >> 23
    # Of the significand's 24 bits, 13 lie below float16's last place, and one more for each exponent below 113, its
    # smallest normal one (2^-14). Shifted left by 3 they are fixed point with 16 fractional bits. At a shift of 31 all
    # are gone, those of float32's subnormals too, whose hidden bit is not 1; a shift of 32 or more is undefined.
    significand = ((magnitude & 0x007FFFFF) | 0x00800000) << 3
    below = 113 - tl.minimum(exponent, 113)
    q = ((significand >> tl.minimum(below, 31)) + random) >> 16
    # q holds the hidden bit 0x400 of a normal number, which adds the missing one to the exponent field.
    half = ((tl.maximum(exponent, 113) - 113) << 10) + q
    half = tl.where(magnitude < 0x477FF000, tl.minimum(half, 0x7BFF), 0x7C00)  # 0x477ff000 is 65520
    half = tl.where(magnitude > 0x7F800000, 0x7E00, half)
    return (half | ((bits >> 16) & 0x8000)).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def round_stochastic(x, random, DTYPE: tl.constexpr):
    """float32 x and 16 random bits (uint32, below 2^16) of the same shape, to float16 or bfloat16."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        y = _stochastic_bf16(x, random)
    elif DTYPE == tl.float16:  # noqa: SIM300
        y = _stochastic_fp16(x, random)
    else:
        tl.static_assert(False, "only float16 and bfloat16 are rounded stochastically")
    return y


@triton.jit
def round_nearest(x, DTYPE: tl.constexpr, UNFUSED: tl.constexpr = False):
    """float32 to DTYPE, nearest even: one conversion instruction, none for float32.

    UNFUSED: x may not be computed and rounded by one instruction. For AMD's GPUs LLVM makes one of a float32 fma, or a
    product, and its conversion (v_fma_mixlo_f16). Up to Triton 3.8 it loses the sign of a zero, and sources disagree on
    whether it rounds to float32 in between. An empty line of assembly between the two keeps them apart.
    """
    if UNFUSED and DTYPE.primitive_bitwidth == 16:
        x = tl.inline_asm_elementwise("", "=v,0", [x], dtype=tl.float32, is_pure=True, pack=1)
    return x.to(DTYPE)
