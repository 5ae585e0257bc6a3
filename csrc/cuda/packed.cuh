// The lane bundle of GPUs with packed float32 operations: one block of eight elements per thread, as four pairs.
//
// Each half of a packed operation is one correctly rounded float32 operation, so the bits are those of Lanes. Integers,
// conversions and roundings have no packed form and go half by half.
//
// ptxas before 13.1 contracts add.rn.f32x2(mul.rn.f32x2(a, b), c) to one fused operation, against --fmad=false and
// against the PTX manual. No rule and no part of the noise adds to a product but by fma; a test looks for it in the
// PTX.
#pragma once
#include "lanes.cuh"

namespace zk {
namespace ZK_ISA {

struct PackedFloat {
  uint64_t halves;
  static ZK_FN PackedFloat of(float low, float high) {
    PackedFloat x;
    asm("mov.b64 %0, {%1, %2};" : "=l"(x.halves) : "f"(low), "f"(high));
    return x;
  }
  ZK_FN void get(float& low, float& high) const { asm("mov.b64 {%0, %1}, %2;" : "=f"(low), "=f"(high) : "l"(halves)); }
  template <class F>
  ZK_FN PackedFloat each(const F& f) const {
    float low, high;
    get(low, high);
    return of(f(low), f(high));
  }
};
ZK_FN PackedFloat operator*(PackedFloat a, PackedFloat b) {
  PackedFloat x;
  asm("mul.rn.f32x2 %0, %1, %2;" : "=l"(x.halves) : "l"(a.halves), "l"(b.halves));
  return x;
}
ZK_FN PackedFloat operator+(PackedFloat a, PackedFloat b) {
  PackedFloat x;
  asm("add.rn.f32x2 %0, %1, %2;" : "=l"(x.halves) : "l"(a.halves), "l"(b.halves));
  return x;
}
ZK_FN PackedFloat operator*(PackedFloat a, float b) {
  return a * PackedFloat::of(b, b);
}
ZK_FN PackedFloat operator+(PackedFloat a, float b) {
  return a + PackedFloat::of(b, b);
}
ZK_FN PackedFloat operator-(PackedFloat a) {
  return a.each([](float x) { return -x; });
}

// Two integers, each in a register of its own.
template <class I>
struct Two {
  I low, high;
};
ZK_FN Two<uint32_t> operator*(Two<uint32_t> a, uint32_t b) {
  return {a.low * b, a.high * b};
}
ZK_FN Two<uint32_t> operator-(Two<uint32_t> a, uint32_t b) {
  return {a.low - b, a.high - b};
}
ZK_FN Two<uint32_t> operator-(uint32_t a, Two<uint32_t> b) {
  return {a - b.low, a - b.high};
}
ZK_FN Two<uint32_t> operator>>(Two<uint32_t> a, int by) {
  return {a.low >> by, a.high >> by};
}

// Which elements of eight make a vector. Two words of a Philox block make two vectors of normals, `across` the words.
// float32 elements lie in memory `along` them: in another order they would be moved together when they are read and
// apart when they are written. 16-bit elements are taken apart anyhow, into either order.
enum class Pairs {
  across,  // (0, 2), (1, 3), (4, 6), (5, 7)
  along,   // (0, 1), (2, 3), (4, 5), (6, 7)
};

template <Pairs kPairs>
struct Packed : Lanes {
  using f32 = PackedFloat;
  using u32 = Two<uint32_t>;
  static constexpr int kVectors = 4, kPack = 2;
  static constexpr int kApart = kPairs == Pairs::across ? 2 : 1;  // a vector's two elements

  static constexpr ZK_FN int first(int v) { return kPairs == Pairs::across ? 4 * (v / 2) + v % 2 : 2 * v; }

  static ZK_FN u32 words(const Word* w) { return {w[0], w[1]}; }
  static ZK_FN f32 all(float x) { return f32::of(x, x); }
  static ZK_FN f32 constant(uint32_t pattern) { return all(__uint_as_float(pattern)); }
  static ZK_FN u32 bits(f32 x) {
    float low, high;
    x.get(low, high);
    return {Lanes::bits(low), Lanes::bits(high)};
  }
  static ZK_FN f32 as_float(u32 x) { return f32::of(Lanes::as_float(x.low), Lanes::as_float(x.high)); }
  static ZK_FN Two<int32_t> as_int(u32 x) { return {int32_t(x.low), int32_t(x.high)}; }
  template <class I>
  static ZK_FN f32 to_float(Two<I> x) {
    return f32::of(Lanes::to_float(x.low), Lanes::to_float(x.high));
  }
  static ZK_FN u32 insert_mantissa(u32 x, uint32_t exponent) {
    return {Lanes::insert_mantissa(x.low, exponent), Lanes::insert_mantissa(x.high, exponent)};
  }
  static ZK_FN f32 fma(f32 a, f32 b, f32 c) {
    f32 x;
    asm("fma.rn.f32x2 %0, %1, %2, %3;" : "=l"(x.halves) : "l"(a.halves), "l"(b.halves), "l"(c.halves));
    return x;
  }
  template <class F>
  static ZK_FN f32 half_by_half(const F& f, f32 x, f32 y) {
    float x0, x1, y0, y1;
    x.get(x0, x1), y.get(y0, y1);
    return f32::of(f(x0, y0), f(x1, y1));
  }
  static ZK_FN f32 at_least(f32 x, f32 low) { return half_by_half(fmaxf, x, low); }
  static ZK_FN f32 at_most(f32 x, f32 high) { return half_by_half(fminf, x, high); }
  static ZK_FN f32 where_above(f32 x, f32 y, f32 above, f32 other) {
    float x0, x1, y0, y1, a0, a1, b0, b1;
    x.get(x0, x1), y.get(y0, y1), above.get(a0, a1), other.get(b0, b1);
    return f32::of(x0 > y0 ? a0 : b0, x1 > y1 ? a1 : b1);
  }

  static ZK_FN void pack(f32 (&x)[4], const float (&e)[8]) {
    ZK_UNROLL
    for (int v = 0; v < 4; ++v) x[v] = f32::of(e[first(v)], e[first(v) + kApart]);
  }
  static ZK_FN void unpack(float (&e)[8], const f32 (&x)[4]) {
    ZK_UNROLL
    for (int v = 0; v < 4; ++v) x[v].get(e[first(v)], e[first(v) + kApart]);
  }
  // The last product of a normal is where its place is free to choose: `along`, each half by itself.
  static ZK_FN void times(f32& z0, f32& z1, f32 r, f32 c, f32 s) {
    if constexpr (kPairs == Pairs::across) {
      z0 = r * c, z1 = r * s;
    } else {
      float r0, r1, c0, c1, s0, s1;
      r.get(r0, r1), c.get(c0, c1), s.get(s0, s1);
      z0 = f32::of(r0 * c0, r0 * s0), z1 = f32::of(r1 * c1, r1 * s1);
    }
  }
  template <class T>
  static ZK_FN void load(f32 (&x)[4], const T* p) {
    float e[8];
    Lanes::load(e, p);
    pack(x, e);
  }
  template <class T>
  static ZK_FN void widen(f32 (&x)[4], const Out<T>& out) {
    float e[8];
    Lanes::widen(e, out);
    pack(x, e);
  }
  template <class T>
  static ZK_FN void round(Out<T>& out, const f32 (&x)[4]) {
    float e[8];
    unpack(e, x);
    Lanes::round(out, e);
  }
  template <class T>
  static ZK_FN void round(Out<T>& out, const f32 (&x)[4], const Word (&words)[1][4]) {
    float e[8];
    unpack(e, x);
    Lanes::round(out, e, words);
  }
};

// What whole tiles of T with states S go through on the architecture that is compiled for. sm_100 and sm_103 have packed
// operations; for sm_110 and sm_120 ptxas takes them apart again.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1100
constexpr bool kPackedPairs = true;
template <class T, class S, class R>
using Whole = Packed<sizeof(T) == 4 || (R::kStates > 0 && sizeof(S) == 4) ? Pairs::along : Pairs::across>;
#else
constexpr bool kPackedPairs = false;
template <class T, class S, class R>
using Whole = Lanes;
#endif

}  // namespace ZK_ISA
}  // namespace zk
