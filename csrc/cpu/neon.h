// What NEON does better than the lanes' general code: two vectors of floats to eight numbers of 16 bits. Bits are those
// of rounding.h. Included by lanes.h, once per instruction set.
#pragma once
#include <arm_neon.h>

#include "../noise.h"

namespace zk {
namespace ZK_ISA {
namespace neon {

using Floats = float32x4_t;
using Words = uint32x4_t;
using Halves = uint16x8_t;

ZK_FN Words ordered(Floats x) {
  return vceqq_f32(x, x);
}

// The upper and the lower halves of words.
ZK_FN Halves upper(Words a, Words b) {
  return vuzp2q_u16((Halves)a, (Halves)b);
}
ZK_FN Halves lower(Words a, Words b) {
  return vuzp1q_u16((Halves)a, (Halves)b);
}
// The upper halves of sums.
ZK_FN Halves upper_of_sum(Words a, Words b, Halves more) {
  return upper(vaddw_u16(a, vget_low_u16(more)), vaddw_high_u16(b, more));
}

ZK_FN Halves nearest_fp16(Floats a, Floats b) {
  return (Halves)vcvt_high_f16_f32(vcvt_f16_f32(a), b);
}

// |x| in units of 2^-24 or, from 2^-14 on, of the last place above float16's exponent, with 16 fractional bits.
ZK_FN Words fixed_fp16(Floats x) {
  const Floats size = vabsq_f32(x);
  const Words subnormal = vcvtq_n_u32_f32(vmulq_n_f32(size, 0x1p8f), 32);
  const Words normal = vsubq_u32(vshlq_n_u32((Words)x, 3), vdupq_n_u32(112u << 26));  // less a difference of biases
  return vbslq_u32(vcltq_f32(size, vdupq_n_f32(0x1p-14f)), subnormal, normal);
}
// The sign, infinities and NaN are what rounding to nearest makes of them.
ZK_FN Halves stochastic_fp16(Floats a, Floats b, Halves random) {
  const Halves nearest = nearest_fp16(a, b), size = vbicq_u16(nearest, vdupq_n_u16(0x8000));
  const Halves finite = vminq_u16(upper_of_sum(fixed_fp16(a), fixed_fp16(b), random), vdupq_n_u16(0x7bff));
  const Halves special = vminq_u16(size, vdupq_n_u16(0x7e00));
  const Halves rounded = vbslq_u16(vcgeq_u16(size, vdupq_n_u16(0x7c00)), special, finite);
  return vbslq_u16(vdupq_n_u16(0x8000), nearest, rounded);
}

ZK_FN Halves nearest_bf16_no_nan(Floats a, Floats b) {
  const Words x = (Words)a, y = (Words)b, half = vdupq_n_u32(0x7fff), odd = vdupq_n_u32(0x10000);
  const uint16x4_t first = vsubhn_u32(vaddq_u32(x, half), vtstq_u32(x, odd));  // a test's true is -1
  return vsubhn_high_u32(first, vaddq_u32(y, half), vtstq_u32(y, odd));
}
ZK_FN Halves stochastic_bf16_no_nan(Floats a, Floats b, Halves random) {
  return upper_of_sum((Words)a, (Words)b, random);
}
// bits, and a NaN where a or b is one.
ZK_FN Halves or_nan_bf16(Halves bits, Floats a, Floats b) {
  return vbslq_u16(lower(ordered(a), ordered(b)), bits, vdupq_n_u16(0x7fc0));
}

}  // namespace neon
}  // namespace ZK_ISA
}  // namespace zk
