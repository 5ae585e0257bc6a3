// float32 to the bits of a 16-bit type, given 16 random bits: stochastic rounding. Shared by the CPU and CUDA backends.
//
// bf16: add the random bits to the float's bit pattern and truncate. Infinity has no low bits, so it passes through.
// fp16: |x| as a fixed-point number in units of the last place with 16 fractional bits, plus the random bits, shifted
// right by 16. A subnormal result drops more than 13 bits, which the shift follows. P(up) is exact while |x| >= 2^-17
// and within 2^-16 of it below. Overflow is as in rounding to nearest even: |x| >= 65520 is infinite, less never is.
// A NaN stays a NaN; its payload is not part of the contract. Equation: docs/noise.md, section 3.
#pragma once
#include "noise.h"

namespace zk {
namespace ZK_ISA {

template <class L>
ZK_FN typename L::u32 stochastic_bf16_no_nan(typename L::f32 x, typename L::u32 random) {
  return (L::bits(x) + random) >> 16;
}
template <class L>
ZK_FN typename L::u32 stochastic_bf16(typename L::f32 x, typename L::u32 random) {
  return x != x ? L::splat(0x7fc0u) : stochastic_bf16_no_nan<L>(x, random);
}

template <class L>
ZK_FN typename L::u32 stochastic_fp16(typename L::f32 x, typename L::u32 random) {
  using U = typename L::u32;
  const U b = L::bits(x), mag = b & 0x7fffffffu, sign = (b >> 16) & 0x8000u;
  const U hidden = mag >= 0x00800000u ? L::splat(0x00800000u) : L::splat(0u);
  const U m = (mag & 0x007fffffu) | hidden;
  const U e = mag >> 23;                        // 0 and 1 share their scale, and both shift everything out
  const U e16 = e > 113u ? e : L::splat(113u);  // 113 is 2^-14, float16's smallest normal exponent
  const U down = e16 - e;                       // further bits that a subnormal result drops
  const U fixed = down > 27u ? L::splat(0u) : (m << 3) >> (down & 31u);
  const U half = ((e16 - 113u) << 10) + ((fixed + random) >> 16);
  const U finite = half < 0x7bffu ? half : L::splat(0x7bffu);
  const U overflow = mag > 0x7f800000u ? L::splat(0x7e00u) : L::splat(0x7c00u);
  return (mag < 0x477ff000u ? finite : overflow) | sign;  // 0x477ff000 is 65520
}

// Whether any element of a tile may be NaN: a chain of products and sums is NaN if one of its terms is (and now and
// then where infinities meet, which only costs time). One test for a tile instead of one for each element.
template <class L>
ZK_FN bool maybe_nan(const typename L::f32 (&x)[L::kVectors]) {
  typename L::f32 chain = x[0];
  ZK_UNROLL
  for (int v = 1; v + 1 < L::kVectors - 1; v += 2) chain = L::fma(x[v], x[v + 1], chain);
  return L::any_unordered(chain, x[L::kVectors - 1]);
}

// Rounding to nearest even in integers, for machines without a conversion instruction.

template <class L>
ZK_FN typename L::u32 nearest_bf16_no_nan(typename L::f32 x) {
  const typename L::u32 b = L::bits(x);
  return (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
}
template <class L>
ZK_FN typename L::u32 nearest_bf16(typename L::f32 x) {
  return x != x ? L::splat(0x7fc0u) : nearest_bf16_no_nan<L>(x);
}

template <class L>
ZK_FN typename L::u32 nearest_fp16(typename L::f32 x) {
  using U = typename L::u32;
  const U b = L::bits(x), mag = b & 0x7fffffffu, sign = (b >> 16) & 0x8000u;
  // Adding 1/2 aligns a subnormal result to float16's grid of 2^-24: the float unit does the rounding.
  const U subnormal = L::bits(L::as_float(mag) + 0.5f) - 0x3f000000u;
  const U normal = (mag - 0x38000000u + 0x0fffu + ((mag >> 13) & 1u)) >> 13;
  const U overflow = mag > 0x7f800000u ? L::splat(0x7e00u) : L::splat(0x7c00u);
  const U finite = mag < 0x38800000u ? subnormal : normal;
  return (mag < 0x477ff000u ? finite : overflow) | sign;
}

template <class L>
ZK_FN typename L::f32 widen_fp16(typename L::u32 half) {
  using U = typename L::u32;
  const U mag = (half & 0x7fffu) << 13;
  const U scaled = L::bits(L::as_float(mag) * 0x1p112f);  // exact, subnormals included
  const U special = mag | 0x7f800000u;                    // infinity and NaN
  return L::as_float((mag >= 0x0f800000u ? special : scaled) | ((half & 0x8000u) << 16));
}

}  // namespace ZK_ISA
}  // namespace zk
