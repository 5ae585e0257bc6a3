// The GPU's lane bundle: one block of eight elements per thread. Every operation is a correctly rounded intrinsic or an
// integer instruction; 16-bit vectors move as one 16-byte access, float32 as two.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../pass.h"
#include "../rounding.h"

namespace zk {
namespace ZK_ISA {

constexpr int kThreads = 256;  // of a thread block

using Half = __half;
using BFloat = __nv_bfloat16;

struct Lanes {
  using Scalar = Lanes;
  using f32 = float;
  using u32 = uint32_t;
  using u64 = uint64_t;
  using Word = u32;  // of a Philox block, of which `words` makes what normal_pair takes
  static constexpr int kWidth = 1, kSub = 1, kHalves = 1, kVectors = 8, kPack = 1;

  static ZK_FN u32 words(const Word* w) { return *w; }

  static ZK_FN f32 all(float x) { return x; }
  static ZK_FN u32 splat(uint32_t x) { return x; }
  static ZK_FN u64 splat64(uint32_t x) { return x; }
  static ZK_FN u32 iota() { return 0; }
  static ZK_FN u32 bits(f32 x) { return __float_as_uint(x); }
  static ZK_FN f32 as_float(u32 x) { return __uint_as_float(x); }
  static ZK_FN int32_t as_int(u32 x) { return int32_t(x); }
  static ZK_FN f32 to_float(int32_t x) { return __int2float_rn(x); }
  static ZK_FN f32 to_float(u32 x) { return __uint2float_rn(x); }
  static ZK_FN f32 constant(uint32_t pattern) { return __uint_as_float(pattern); }
  // The low 23 bits of x under `exponent`. As a bit-field insertion it keeps the exponent in a register and takes one
  // instruction; written with two immediates it takes two.
  static ZK_FN u32 insert_mantissa(u32 x, uint32_t exponent) {
    u32 y;
    asm("bfi.b32 %0, %1, %2, 0, 23;" : "=r"(y) : "r"(x), "r"(exponent));
    return y;
  }
  // 1.0f with the sign bit of x.
  static ZK_FN f32 signed_one(u32 x) {
    f32 y;
    asm("copysign.f32 %0, %1, 0f3f800000;" : "=f"(y) : "f"(__uint_as_float(x)));
    return y;
  }
  static ZK_FN f32 fma(f32 a, f32 b, f32 c) { return __fmaf_rn(a, b, c); }
  static ZK_FN f32 at_least(f32 x, f32 low) { return fmaxf(x, low); }
  static ZK_FN f32 at_most(f32 x, f32 high) { return fminf(x, high); }
  static ZK_FN f32 where_above(f32 x, f32 y, f32 above, f32 other) { return x > y ? above : other; }
  // In PTX, because the compiler widens the C++ expression to a 64-bit product: one more instruction for each.
  static ZK_FN u64 mul(u64 a, uint32_t b) {
    u64 p;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(p) : "r"(uint32_t(a)), "r"(b));
    return p;
  }
  static ZK_FN u64 high(u64 p) { return p >> 32; }
  static ZK_FN u64 counter(uint32_t block, int) { return block; }
  static ZK_FN u32 join(u64 a, u64) { return u32(a); }
  static ZK_FN void times(f32& z0, f32& z1, f32 r, f32 c, f32 s) { z0 = r * c, z1 = r * s; }
  template <class V>
  static ZK_FN void to_memory_order(V*) {}

  // ------------------------------------------------------------------------------------------------- dtypes and memory
  template <class T>
  struct Out {
    alignas(16) T element[8];
  };

  static ZK_FN f32 widen(float x) { return x; }
  static ZK_FN f32 widen(__half x) { return __half2float(x); }
  static ZK_FN f32 widen(__nv_bfloat16 x) { return __bfloat162float(x); }

  static ZK_FN void widen_pair(f32 (&x)[8], int v, __half, uint32_t word) {
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word));
    x[v] = pair.x;
    x[v + 1] = pair.y;
  }
  // One instruction each, where the library's conversion of a vector's upper halves takes two.
  static ZK_FN void widen_pair(f32 (&x)[8], int v, __nv_bfloat16, uint32_t word) {
    x[v] = __uint_as_float(word << 16);
    x[v + 1] = __uint_as_float(word & 0xffff0000u);
  }

  static ZK_FN void load(f32 (&x)[8], const float* p) {
    __builtin_assume(__isGlobal(p));
    const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  }
  template <class T>
  static ZK_FN void load(f32 (&x)[8], const T* p) {
    __builtin_assume(__isGlobal(p));
    const uint4 in = *reinterpret_cast<const uint4*>(p);
    widen_pair(x, 0, T(), in.x);
    widen_pair(x, 2, T(), in.y);
    widen_pair(x, 4, T(), in.z);
    widen_pair(x, 6, T(), in.w);
  }
  template <class T>
  static ZK_FN void widen(f32 (&x)[8], const Out<T>& out) {
    ZK_UNROLL
    for (int v = 0; v < 8; v += 2) widen_pair(x, v, T(), reinterpret_cast<const u32*>(out.element)[v / 2]);
  }
  // Elements [lo, hi) of eight as a bit mask: one register instead of two, tested bit by bit.
  static ZK_FN uint32_t part(int lo, int hi) { return (0xffu << lo) & (0xffu >> (8 - hi)); }
  template <class T>
  static ZK_FN void load_part(f32 (&x)[8], const T* p, int lo, int hi) {
    __builtin_assume(__isGlobal(p));
    const uint32_t mask = part(lo, hi);
    ZK_UNROLL
    for (int v = 0; v < 8; ++v) x[v] = mask & (1u << v) ? widen(p[v]) : 0.f;
  }

  static ZK_FN void round(Out<float>& out, const f32 (&x)[8]) {
    ZK_UNROLL
    for (int v = 0; v < 8; ++v) out.element[v] = x[v];
  }
  static ZK_FN void round(Out<__half>& out, const f32 (&x)[8]) {
    ZK_UNROLL
    for (int v = 0; v < 8; v += 2) reinterpret_cast<__half2*>(out.element)[v / 2] = __floats2half2_rn(x[v], x[v + 1]);
  }
  static ZK_FN void round(Out<__nv_bfloat16>& out, const f32 (&x)[8]) {
    ZK_UNROLL
    for (int v = 0; v < 8; v += 2)
      reinterpret_cast<__nv_bfloat162*>(out.element)[v / 2] = __floats2bfloat162_rn(x[v], x[v + 1]);
  }
  static ZK_FN void round(Out<__half>& out, const f32 (&x)[8], const u32 (&words)[1][4]) {
    u32 random[8];
    rounding_bits<Lanes>(random, words[0]);
    ZK_UNROLL
    for (int v = 0; v < 8; ++v) out.element[v] = __ushort_as_half(uint16_t(stochastic_fp16<Lanes>(x[v], random[v])));
  }
  static ZK_FN bool any_unordered(f32 a, f32 b) {
    uint32_t either;
    asm("{ .reg .pred p; setp.nan.f32 p, %1, %2; selp.u32 %0, 1, 0, p; }" : "=r"(either) : "f"(a), "f"(b));
    return either != 0;
  }
  static ZK_FN void round(Out<__nv_bfloat16>& out, const f32 (&x)[8], const u32 (&words)[1][4]) {
    u32 y[8];
    if (maybe_nan<Lanes>(x)) {
      u32 random[8];
      rounding_bits<Lanes>(random, words[0]);
      ZK_UNROLL
      for (int v = 0; v < 8; ++v) y[v] = stochastic_bf16<Lanes>(x[v], random[v]) << 16;
    } else {
      ZK_UNROLL
      for (int j = 0; j < 4; ++j) {
        y[2 * j] = __dp2a_lo(words[0][j], 1u, bits(x[2 * j]));  // x + the low half of the word, in one instruction
        y[2 * j + 1] = bits(x[2 * j + 1]) + (words[0][j] >> 16);
      }
    }
    ZK_UNROLL
    for (int v = 0; v < 8; v += 2) reinterpret_cast<u32*>(out.element)[v / 2] = __byte_perm(y[v], y[v + 1], 0x7632);
  }

  template <class T>
  static ZK_FN void store(T* p, const Out<T>& out) {
    __builtin_assume(__isGlobal(p));
    ZK_UNROLL
    for (int i = 0; i < int(sizeof(T)) / 2; ++i)
      reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(out.element)[i];
  }
  template <class T>
  static ZK_FN void store_part(T* p, const Out<T>& out, int lo, int hi) {
    __builtin_assume(__isGlobal(p));
    const uint32_t mask = part(lo, hi);
    ZK_UNROLL
    for (int v = 0; v < 8; ++v)
      if (mask & (1u << v)) p[v] = out.element[v];
  }
};

// Two blocks of eight elements per thread, which share what a further direction costs besides its noise. They lie
// kThreads blocks apart, so that a warp's accesses are to consecutive addresses. For whole tiles, and not for signs.
template <class One>
struct PairOf : One {
  using typename One::f32;
  using typename One::u64;
  using typename One::Word;
  static constexpr int kWidth = 2, kSub = 2, kHalves = 2, kEach = One::kVectors, kVectors = 2 * kEach;
  static constexpr int kStride = 8 * kThreads;
  using Half = f32[kEach];
  using Words = Word[1][4];

  static ZK_FN u64 counter(uint32_t block, int half) { return block + uint32_t(half * kThreads); }
  template <class T>
  struct Out {
    typename One::template Out<T> half[2];
  };
  template <class T>
  static ZK_FN void load(f32 (&x)[kVectors], const T* p) {
    One::load(reinterpret_cast<Half&>(x[0]), p);
    One::load(reinterpret_cast<Half&>(x[kEach]), p + kStride);
  }
  template <class T>
  static ZK_FN void round(Out<T>& out, const f32 (&x)[kVectors]) {
    One::round(out.half[0], reinterpret_cast<const Half&>(x[0]));
    One::round(out.half[1], reinterpret_cast<const Half&>(x[kEach]));
  }
  template <class T>
  static ZK_FN void round(Out<T>& out, const f32 (&x)[kVectors], const Word (&words)[2][4]) {
    One::round(out.half[0], reinterpret_cast<const Half&>(x[0]), reinterpret_cast<const Words&>(words[0]));
    One::round(out.half[1], reinterpret_cast<const Half&>(x[kEach]), reinterpret_cast<const Words&>(words[1]));
  }
  template <class T>
  static ZK_FN void store(T* p, const Out<T>& out) {
    One::store(p, out.half[0]);
    One::store(p + kStride, out.half[1]);
  }
};

}  // namespace ZK_ISA
}  // namespace zk
