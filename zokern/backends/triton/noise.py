"""The noise contract `zk1` in Triton: words, normals, signs, rounding bits. Nothing else in Triton repeats it.

z is a pure function of (seed, tensor id, global element index). Every float operation is one correctly rounded IEEE-754
single operation, in the order of docs/noise.md: `fma` where the contract fuses and never `a*b + c`, so that the bits
do not depend on what a compiler contracts. A *tile* is BLOCK consecutive blocks of 8 elements, laid out [BLOCK, 8]; its
first block is `first` (a multiple of 16, low word) with the high word `high`, and `lanes` is arange(BLOCK).
Sources: Salmon et al. 2011 (Philox4x32-10), Box and Muller 1958.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import struct

import triton
import triton.language as tl

from .packed import fma, mul, together

PURPOSE_NORMAL = tl.constexpr(0)
PURPOSE_ROUNDING = tl.constexpr(1)
PURPOSE_RADEMACHER = tl.constexpr(2)
PURPOSE_LEFT = tl.constexpr(3)
PURPOSE_RIGHT = tl.constexpr(4)


def _f32(pattern: int) -> tl.constexpr:
    """The float32 with this bit pattern, so that no decimal parser takes part."""
    return tl.constexpr(struct.unpack("<f", struct.pack("<I", pattern))[0])


# -ln(m) for the mantissa, and -ln(2) * 2^-23 per unit of the exponent's difference
P0, P1, P2 = _f32(0xBD002F20), _f32(0x3E94D03B), _f32(0xBF91A12F)
P3, P4, P5 = _f32(0x401E51D6), _f32(0xC03630F9), _f32(0x3FA02CE3)
LN2_SCALE = _f32(0xB3B17218)
# one step that refines 1/sqrt
G0, G1, G2 = _f32(0x407B6A77), _f32(0xC0BC39E4), _f32(0x407D6A5A)
# cos(2 pi t) and sin(2 pi t) / t as polynomials in t^2
C0, C1, C2 = _f32(0xC1A89D40), _f32(0x426B2D19), _f32(0xC2AA8B78)
C3, C4, C5 = _f32(0x4281DB82), _f32(0xC19DE970), _f32(0x3F7FFFF3)
D0, D1, D2 = _f32(0x42032028), _f32(0xC294F4BD), _f32(0x42A2BBCF)
D3, D4 = _f32(0xC225532A), _f32(0x40C90ECB)
TURN = _f32(0x2F800000)  # 2^-32


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four uint32 words of Philox4x32-10 for a counter (uint32, any broadcastable shapes) and a key (two uint32).

    Products are taken in uint64 and split, one wide multiply each; `tl.umulhi` would multiply twice. Scalars stay
    scalars, so that the compiler hoists two of the twenty multiplies and the key schedule out of a loop over blocks.
    The key comes as words because LLVM carries words cut from an int64 through all rounds in 64 bits, 4 slots more.
    """
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def normal_pair(w, PACKED: tl.constexpr = False):
    """One uint32 word to two independent standard normals: a bijection of w makes the radius, w itself the angle."""
    xf = (w * 0x915F77F5).to(tl.float32) + 0.5
    i = xf.to(tl.uint32, bitcast=True)
    e = (i - 0x4F800000).to(tl.int32, bitcast=True).to(tl.float32)
    m = ((i & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    p = fma(m, P0, P1, PACKED)
    p = fma(p, m, P2, PACKED)
    p = fma(p, m, P3, PACKED)
    p = fma(p, m, P4, PACKED)
    p = fma(p, m, P5, PACKED)
    h = fma(e, LN2_SCALE, p, PACKED)  # -ln((x + 1/2) / 2^32)
    y = (0x5EEC0000 - (h.to(tl.uint32, bitcast=True) >> 1)).to(tl.float32, bitcast=True)  # 1/sqrt(2h), 4 % off
    s = mul(h, y, PACKED)
    v = mul(s, y, PACKED)
    g = fma(v, G0, G1, PACKED)
    g = fma(g, v, G2, PACKED)
    r = mul(s, g, PACKED)  # sqrt(2h)
    t = mul(w.to(tl.int32, bitcast=True).to(tl.float32), TURN, PACKED)  # the angle in turns, in [-1/2, 1/2]
    q = mul(t, t, PACKED)
    c = fma(q, C0, C1, PACKED)
    c = fma(c, q, C2, PACKED)
    c = fma(c, q, C3, PACKED)
    c = fma(c, q, C4, PACKED)
    c = fma(c, q, C5, PACKED)
    d = fma(q, D0, D1, PACKED)
    d = fma(d, q, D2, PACKED)
    d = fma(d, q, D3, PACKED)
    d = fma(d, q, D4, PACKED)
    return r * c, r * mul(d, t, PACKED)


@triton.jit
def _words(first, high, lanes, tensor_id, purpose, k0, k1):
    """Words of the tile's blocks, [BLOCK, 4] uint32: word j of lane b at [b, j], four registers of one thread."""
    w0, w1, w2, w3 = philox(first + lanes, high, tensor_id, purpose, k0, k1)
    even_odd = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK, j >> 1, j & 1]
    return tl.reshape(even_odd, [lanes.shape[0], 4])


@triton.jit
def normal_halves(first, high, lanes, tensor_id, k0, k1, PACKED: tl.constexpr = False, purpose=PURPOSE_NORMAL):
    """The tile's normals, those at even indices and those at odd ones, [BLOCK, 4] float32 each."""
    return normal_pair(_words(first, high, lanes, tensor_id, purpose, k0, k1), PACKED)


@triton.jit
def normals(first, high, lanes, tensor_id, k0, k1, PACKED: tl.constexpr, purpose=PURPOSE_NORMAL):
    """The tile's normals, [BLOCK, 8] float32."""
    even, odd = normal_halves(first, high, lanes, tensor_id, k0, k1, PACKED, purpose)
    return together(even, odd)


@triton.jit
def rounding_bits(first, high, lanes, tensor_id, k0, k1):
    """16 random bits for each element of the tile, [BLOCK, 8] uint32."""
    w = _words(first, high, lanes, tensor_id, PURPOSE_ROUNDING, k0, k1)
    return tl.reshape(tl.join(w & 0xFFFF, w >> 16), [lanes.shape[0], 8])


@triton.jit
def signs(first, high, lanes, tensor_id, k0, k1):
    """The tile's signs, [BLOCK, 8] float32. A 128-bit block serves 16 lanes, each of which recomputes it."""
    block = ((first >> 4) | (high << 28)) + (lanes >> 4)
    w0, w1, w2, w3 = philox(block, high >> 4, tensor_id, PURPOSE_RADEMACHER, k0, k1)
    quarter = lanes & 12  # first is a multiple of 16, so which 8 of the 128 bits are a lane's does not depend on it
    w = tl.where(quarter < 8, tl.where(quarter == 0, w0, w1), tl.where(quarter == 8, w2, w3)) >> ((lanes & 3) * 8)
    bits = w[:, None] >> tl.arange(0, 8).to(tl.uint32)[None, :]
    return ((bits << 31) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def direction(first, high, lanes, tensor_id, k0, k1, DISTRIBUTION: tl.constexpr, PACKED: tl.constexpr):
    """The tile's z, [BLOCK, 8] float32, of "normal" or "rademacher"."""
    if DISTRIBUTION == "normal":
        z = normals(first, high, lanes, tensor_id, k0, k1, PACKED)
    elif DISTRIBUTION == "rademacher":
        z = signs(first, high, lanes, tensor_id, k0, k1)
    else:
        tl.static_assert(False, "direction does not know the distribution " + DISTRIBUTION)
    return z
