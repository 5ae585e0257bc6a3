// The CPU's lane bundle: a small vector layer over the compiler's vector types, W blocks of eight elements side by
// side.
//
// One source for AVX-512 (W = 16), AVX2 with FMA (W = 8), and plain builds for any processor (W = 4: SSE2, NEON, or
// what the compiler makes of it). Intrinsics appear only where vector types cannot say it: fused multiply-add,
// 32x32->64 products of the even lanes, and float16 conversion; on 64-bit Arm, whose intrinsics for 16-bit numbers are
// in neon.h, where compilers do not find the instruction. Included once per instruction set, in its own namespace, so
// that no function compiled for one set can be linked into another.
#pragma once
#include <cstring>
#include <utility>
#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include "neon.h"
#endif

#include "../lowrank.h"
#include "../pass.h"

namespace zk {
namespace ZK_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// One block at a time: the words of the sign blocks.
struct ScalarLanes {
  using u32 = uint32_t;
  using u64 = uint64_t;
  using Word = u32;
  static constexpr int kSub = 1, kHalves = 1, kPack = 1;
  static ZK_FN u64 mul(u64 a, uint32_t b) { return uint64_t(uint32_t(a)) * b; }
  static ZK_FN u64 high(u64 p) { return p >> 32; }
  static ZK_FN u64 counter(uint32_t block, int) { return block; }
  static ZK_FN u32 join(u64 a, u64) { return u32(a); }
};

struct Lanes {
#if defined(__AVX512F__)
  static constexpr int W = 16;
#elif defined(__AVX2__)
  static constexpr int W = 8;
#else
  static constexpr int W = 4;
#endif
  using Scalar = ScalarLanes;
  static constexpr int kSub = 2, kWidth = kSub * W, kVectors = 8 * kSub;
  static constexpr int kTile = 8 * kWidth;
  typedef float f32 __attribute__((vector_size(4 * W)));
  typedef uint32_t u32 __attribute__((vector_size(4 * W)));
  typedef int32_t i32 __attribute__((vector_size(4 * W)));
  typedef uint16_t u16 __attribute__((vector_size(2 * W)));
  using Word = u32;
  static constexpr int kPack = 1;
#if defined(__aarch64__)
  // Low and high words in vectors of their own: two unzips make them from products, where lanes of 64 bits would take a
  // narrowing before each multiplication and a shift after it.
  struct u64 {
    u32 low, high;
    friend ZK_FN u64 operator^(u64 a, u64 b) { return {a.low ^ b.low, b.high}; }
    friend ZK_FN u64 operator^(u64 a, uint64_t b) { return {a.low ^ uint32_t(b), a.high}; }
  };
  static constexpr bool kArm = true;
  static constexpr int kHalves = kSub;
#else
  typedef uint64_t u64 __attribute__((vector_size(4 * W)));
  static constexpr bool kArm = false;
  static constexpr int kHalves = 2 * kSub;
#endif

  static ZK_FN u32 words(const Word* w) { return *w; }
  static ZK_FN void times(f32& z0, f32& z1, f32 r, f32 c, f32 s) { z0 = r * c, z1 = r * s; }
  static ZK_FN f32 all(float x) { return f32{} + x; }
  static ZK_FN u32 splat(uint32_t x) { return u32{} + x; }
  static ZK_FN u32 bits(f32 x) { return (u32)x; }
  static ZK_FN f32 as_float(u32 x) { return (f32)x; }
  static ZK_FN i32 as_int(u32 x) { return (i32)x; }
  static ZK_FN f32 to_float(i32 x) { return __builtin_convertvector(x, f32); }
  static ZK_FN f32 constant(uint32_t pattern) { return as_float(splat(pattern)); }
  // The bits of x under the mask, those of `other`, which has none there, elsewhere.
  static ZK_FN u32 merge(u32 x, uint32_t mask, uint32_t other) {
#if defined(__aarch64__)
    return (u32)vbslq_u32(vdupq_n_u32(mask), (uint32x4_t)x, vdupq_n_u32(other));
#else
    return (x & mask) | other;
#endif
  }
  static ZK_FN u32 insert_mantissa(u32 x, uint32_t exponent) { return merge(x, 0x007fffffu, exponent); }
  static ZK_FN f32 signed_one(u32 x) { return as_float(merge(x, 0x80000000u, 0x3f800000u)); }
  static ZK_FN u32 iota() {
    u32 lanes{};
    for (int i = 0; i < W; ++i) lanes[i] = uint32_t(i);
    return lanes;
  }

  // Unsigned to float through 16-bit halves: both are exact, and the sum is the only rounding.
  static ZK_FN f32 to_float(u32 x) {
#if defined(__AVX512F__) || defined(__aarch64__)
    return __builtin_convertvector(x, f32);
#else
    return to_float((i32)(x >> 16)) * 65536.f + to_float((i32)(x & 0xffffu));
#endif
  }

  static ZK_FN f32 at_least(f32 x, f32 low) { return x > low ? x : low; }
  static ZK_FN f32 at_most(f32 x, f32 high) { return x < high ? x : high; }
  static ZK_FN f32 where_above(f32 x, f32 y, f32 above, f32 other) { return x > y ? above : other; }

#if !defined(__AVX2__) && !defined(__aarch64__)
  // Not inlined: some twenty instructions at each of hundreds of places.
  static __attribute__((noinline)) f32 emulated_fma(f32 a, f32 b, f32 c) {
    // The exact product, a sum rounded to odd, one rounding to float: no double rounding (Boldo and Melquiond 2008).
    typedef double f64 __attribute__((vector_size(8 * W)));
    typedef int64_t i64 __attribute__((vector_size(8 * W)));
    const f64 p = __builtin_convertvector(a, f64) * __builtin_convertvector(b, f64);
    const f64 d = __builtin_convertvector(c, f64), s = p + d, dd = s - p;
    const f64 error = (p - (s - dd)) + (d - dd);  // NaN where s is not finite, and then both comparisons are false
    const i64 even = ((i64)s & 1) - 1;
    const i64 up = (error > 0.0) & even, down = (error < 0.0) & even, negative = (i64)s >> 63;
    const i64 away = (up & ~negative) | (down & negative), toward = (down & ~negative) | (up & negative);
    return __builtin_convertvector((f64)((i64)s - away + toward), f32);
  }
#endif

  static ZK_FN f32 fma(f32 a, f32 b, f32 c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return (f32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return emulated_fma(a, b, c);
#endif
  }

  // Products of 32 bits by 32 bits.
  static ZK_FN u64 mul(u64 a, uint32_t b) {
#if defined(__AVX512F__)
    return (u64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    return (u64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
    return (u64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#elif defined(__aarch64__)
    const uint32x4_t x = (uint32x4_t)a.low, y = vdupq_n_u32(b);
    const uint32x4_t first = (uint32x4_t)vmull_u32(vget_low_u32(x), vget_low_u32(y));
    const uint32x4_t last = (uint32x4_t)vmull_high_u32(x, y);
    return {(u32)vuzp1q_u32(first, last), (u32)vuzp2q_u32(first, last)};
#else
    return (a & 0xffffffffull) * uint64_t(b);
#endif
  }

  // Where lanes have 64 bits, Philox runs on even and odd blocks apart, so that no product needs a shuffle.
  static ZK_FN u64 counter(uint32_t block, int half) {
#if defined(__aarch64__)
    const u32 c = iota() + (block + uint32_t(half * W));
    return {c, c};
#else
    u64 c{};
    for (int i = 0; i < W / 2; ++i) c[i] = block + uint32_t(half / 2 * W + 2 * i + half % 2);
    return c;
#endif
  }
  // The high words of products, in the low halves. A shuffle where there is one: shifts share their port with the
  // multiplies that bound this loop. The upper halves are garbage either way.
  static ZK_FN u64 high(u64 p) {
#if defined(__AVX512F__)
    return (u64)_mm512_shuffle_epi32((__m512i)p, _MM_PERM_DDBB);
#elif defined(__AVX2__)
    return (u64)_mm256_shuffle_epi32((__m256i)p, 0xf5);
#elif defined(__aarch64__)
    return {p.high, p.high};
#else
    return p >> 32;
#endif
  }
  static ZK_FN u32 join(u64 even, [[maybe_unused]] u64 odd) {
#if defined(__AVX512F__)
    return (u32)_mm512_mask_shuffle_epi32((__m512i)even, 0xaaaa, (__m512i)odd, _MM_PERM_CCAA);
#elif defined(__AVX2__)
    return (u32)_mm256_blend_epi32((__m256i)even, _mm256_shuffle_epi32((__m256i)odd, 0xa0), 0xaa);
#elif defined(__aarch64__)
    return even.low;  // and odd is the same
#else
    return (u32)((even & 0xffffffffull) | (odd << 32));
#endif
  }

  // zip: lanes a0 b0 a1 b1 ..., low or high half.
  template <class V, int... I>
  static ZK_FN V zip(V a, V b, bool high, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return high ? __builtin_shufflevector(a, b, ((I / 2 + W / 2) + (I % 2) * W)...)
                : __builtin_shufflevector(a, b, ((I / 2) + (I % 2) * W)...);
#else
    return high ? __builtin_shuffle(a, b, i32{((I / 2 + W / 2) + (I % 2) * W)...})
                : __builtin_shuffle(a, b, i32{((I / 2) + (I % 2) * W)...});
#endif
  }

  // y[b] lane e is x[e] lane b, for four lanes.
  template <class V>
  static ZK_FN void transpose(V (&y)[4], const V* x) {
    constexpr auto lanes = std::make_integer_sequence<int, W>();
    const V a = zip(x[0], x[2], false, lanes), b = zip(x[0], x[2], true, lanes);
    const V c = zip(x[1], x[3], false, lanes), d = zip(x[1], x[3], true, lanes);
    y[0] = zip(a, c, false, lanes), y[1] = zip(a, c, true, lanes);
    y[2] = zip(b, d, false, lanes), y[3] = zip(b, d, true, lanes);
  }
  // x[e] lane b is element e of block b; afterwards x[v] lane l is element v*W + l. An 8 x W transposition as three
  // rounds of zips: each moves one bit of e from the register number into the lane number. On Arm (W = 4)
  // two rounds do: elements are in the right halves of their blocks already.
  template <class V>
  static ZK_FN void to_memory_order(V* x) {
    if constexpr (kArm) {
      V low[4], high[4];
      transpose(low, x);
      transpose(high, x + 4);
      x[0] = low[0], x[2] = low[1], x[4] = low[2], x[6] = low[3];
      x[1] = high[0], x[3] = high[1], x[5] = high[2], x[7] = high[3];
      return;
    }
    constexpr auto lanes = std::make_integer_sequence<int, W>();
    ZK_UNROLL
    for (int round = 0; round < 3; ++round) {
      V y[8];
      ZK_UNROLL
      for (int i = 0; i < 4; ++i) {
        y[2 * i] = zip(x[i], x[i + 4], false, lanes);
        y[2 * i + 1] = zip(x[i], x[i + 4], true, lanes);
      }
      ZK_UNROLL
      for (int i = 0; i < 8; ++i) x[i] = y[i];
    }
  }

  // z of W elements of one row, the first of them in this column: U's column `left` by V's row `right`.
  static ZK_FN f32 product(const float* left, int64_t between_left, const float* right, int64_t between_right, int rank) {
    f32 z = all(*left) * load_one(right);
    for (int k = 1; k < rank; ++k) z = fma(all(left[k * between_left]), load_one(right + k * between_right), z);
    return z;
  }
  // z of a tile, row by row of the matrix. Elements before and after a tensor, of tiles that are cut, get any numbers.
  static ZK_FN void products(f32 (&z)[kVectors], uint64_t base, uint32_t b, const FactorsOfSeed& of) {
    const int64_t columns = of.shape.columns, rows = of.shape.rows, all_rows = rows * of.shape.matrices;
    const int64_t first = int64_t(base) + 8 * int64_t(b), n_left = all_rows, n_right = columns * of.shape.matrices;
    int64_t row = first / columns, column = first - row * columns;
    const auto right_of = [&](int64_t r) ZK_LAMBDA {
      return of.right + (of.shape.matrices == 1 ? 0 : r / rows * columns);
    };
    if (column + kTile <= columns) {
      row = row < all_rows ? row : all_rows - 1;
      const float *left = of.left + row, *right = right_of(row) + column;
      ZK_UNROLL
      for (int v = 0; v < kVectors; ++v) z[v] = product(left, n_left, right + v * W, n_right, of.rank);
      return;
    }
    float out[kTile + W];  // a row's last vector reaches into the next one's, which is written after it
    for (int64_t at = 0; at < kTile; column = 0, ++row) {
      const int64_t here = row < all_rows ? row : all_rows - 1, length = columns - column;
      const float *left = of.left + here, *right = right_of(here) + column;
      const int64_t end = length < kTile - at ? length : kTile - at;
      for (int64_t x = 0; x < end; x += W) {
        const f32 some = product(left, n_left, right + x, n_right, of.rank);
        std::memcpy(out + at + x, &some, sizeof some);
      }
      at += end;
    }
    load(z, static_cast<const float*>(out));
  }

  // ------------------------------------------------------------------------------------------------- dtypes and memory
  template <class T>
  struct Out { T element[kTile]; };

  // The compilers' own vector conversion would go through halves.
  static ZK_FN u32 wide16(const void* p) {
#if defined(__AVX512F__)
    return (u32)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return (u32)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
    u16 x;
    std::memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, u32);
#endif
  }
  static ZK_FN void narrow16(void* p, u32 x) {
    const u16 y = __builtin_convertvector(x, u16);
    std::memcpy(p, &y, sizeof y);
  }
  // Two vectors of numbers below 2^16 as one of 16 bits each: half the shuffles of two single conversions.
  static ZK_FN void narrow16(void* p, u32 a, u32 b) {
#if defined(__AVX512F__)
    const __m512i lanes = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi64(lanes, _mm512_packus_epi32((__m512i)a, (__m512i)b)));
#elif defined(__AVX2__)
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)a, (__m256i)b), 0xd8));
#else
    narrow16(p, a);
    narrow16(static_cast<uint16_t*>(p) + W, b);
#endif
  }

  static ZK_FN f32 load_one(const float* p) {
    f32 x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static ZK_FN f32 load_one(const BFloat* p) {
#if defined(__aarch64__)
    uint16x4_t x;
    std::memcpy(&x, p, sizeof x);
    return (f32)vshll_n_u16(x, 16);
#else
    return as_float(wide16(p) << 16);
#endif
  }
  static ZK_FN f32 load_one(const Half* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
    float16x4_t x;
    std::memcpy(&x, p, sizeof x);
    return (f32)vcvt_f32_f16(x);
#else
    return widen_fp16<Lanes>(wide16(p));
#endif
  }
  static ZK_FN bool any_unordered(f32 a, f32 b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)) != 0;
#elif defined(__aarch64__)
    return vminvq_u32(vandq_u32(neon::ordered((neon::Floats)a), neon::ordered((neon::Floats)b))) == 0;
#else
    const i32 either = (a != a) | (b != b);
    int32_t any = 0;
    for (int i = 0; i < W; ++i) any |= either[i];
    return any != 0;
#endif
  }

  template <class T>
  static ZK_FN void load(f32 (&x)[kVectors], const T* p) {
    ZK_UNROLL
    for (int v = 0; v < kVectors; ++v) x[v] = load_one(p + v * W);
  }
  template <class T>
  static ZK_FN void load_part(f32 (&x)[kVectors], const T* p, int lo, int hi) {
    T whole[kTile] = {};
    std::memcpy(whole + lo, p + lo, size_t(hi - lo) * sizeof(T));
    load(x, whole);
  }
  static ZK_FN void round(Out<float>& out, const f32 (&x)[kVectors]) { std::memcpy(out.element, x, sizeof x); }
#if defined(__aarch64__)
  // f(i, a, b) is what is stored of the i-th two vectors; nan: whether there may be one, which f does not look at.
  template <class T, class F>
  static ZK_FN void round_pairs(Out<T>& out, const f32 (&x)[kVectors], bool nan, const F& f) {
    ZK_UNROLL
    for (int v = 0; v < kVectors; v += 2) {
      const neon::Floats a = (neon::Floats)x[v], b = (neon::Floats)x[v + 1];
      neon::Halves y = f(v / 2, a, b);
      if (__builtin_expect(nan, 0)) y = neon::or_nan_bf16(y, a, b);
      std::memcpy(out.element + v * W, &y, sizeof y);
    }
  }
  // The 16 random bits of each element: a block's four words in turn serve its eight elements.
  struct Random {
    neon::Halves pair[kVectors / 2];
    explicit ZK_FN Random(const u32 (&words)[kSub][4]) {
      ZK_UNROLL
      for (int s = 0; s < kSub; ++s) {
        u32 blocks[4];
        transpose(blocks, words[s]);
        ZK_UNROLL
        for (int b = 0; b < 4; ++b) pair[4 * s + b] = (neon::Halves)blocks[b];
      }
    }
  };
  static ZK_FN void round(Out<Half>& out, const f32 (&x)[kVectors]) {
    round_pairs(out, x, false, [](int, neon::Floats a, neon::Floats b) ZK_LAMBDA { return neon::nearest_fp16(a, b); });
  }
  static ZK_FN void round(Out<BFloat>& out, const f32 (&x)[kVectors]) {
    round_pairs(out, x, maybe_nan<Lanes>(x), [](int, neon::Floats a, neon::Floats b) ZK_LAMBDA {
      return neon::nearest_bf16_no_nan(a, b);
    });
  }
  static ZK_FN void round(Out<Half>& out, const f32 (&x)[kVectors], const u32 (&words)[kSub][4]) {
    const Random random(words);
    round_pairs(out, x, false, [&](int i, neon::Floats a, neon::Floats b) ZK_LAMBDA {
      return neon::stochastic_fp16(a, b, random.pair[i]);
    });
  }
  static ZK_FN void round(Out<BFloat>& out, const f32 (&x)[kVectors], const u32 (&words)[kSub][4]) {
    const Random random(words);
    round_pairs(out, x, maybe_nan<Lanes>(x), [&](int i, neon::Floats a, neon::Floats b) ZK_LAMBDA {
      return neon::stochastic_bf16_no_nan(a, b, random.pair[i]);
    });
  }
#else
  static ZK_FN void round(Out<Half>& out, const f32 (&x)[kVectors]) {
    ZK_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Half* p = out.element + v * W;
#if defined(__AVX512F__)
      _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x[v], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
      _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x[v], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
      narrow16(p, nearest_fp16<Lanes>(x[v]));
#endif
    }
  }
  static ZK_FN void round(Out<BFloat>& out, const f32 (&x)[kVectors]) {
    const bool nan = maybe_nan<Lanes>(x);
    ZK_UNROLL
    for (int v = 0; v < kVectors; v += 2) {
      if (__builtin_expect(nan, 0))
        narrow16(out.element + v * W, nearest_bf16<Lanes>(x[v]), nearest_bf16<Lanes>(x[v + 1]));
      else
        narrow16(out.element + v * W, nearest_bf16_no_nan<Lanes>(x[v]), nearest_bf16_no_nan<Lanes>(x[v + 1]));
    }
  }
  static ZK_FN void round(Out<Half>& out, const f32 (&x)[kVectors], const u32 (&words)[kSub][4]) {
    u32 r[kVectors];
    ZK_UNROLL
    for (int s = 0; s < kSub; ++s) rounding_bits<Lanes>(r + 8 * s, words[s]);
    ZK_UNROLL
    for (int v = 0; v < kVectors; v += 2)
      narrow16(out.element + v * W, stochastic_fp16<Lanes>(x[v], r[v]), stochastic_fp16<Lanes>(x[v + 1], r[v + 1]));
  }
  static ZK_FN void round(Out<BFloat>& out, const f32 (&x)[kVectors], const u32 (&words)[kSub][4]) {
    u32 r[kVectors];
    ZK_UNROLL
    for (int s = 0; s < kSub; ++s) rounding_bits<Lanes>(r + 8 * s, words[s]);
    const bool nan = maybe_nan<Lanes>(x);
    ZK_UNROLL
    for (int v = 0; v < kVectors; v += 2) {
      BFloat* p = out.element + v * W;
      if (__builtin_expect(nan, 0))
        narrow16(p, stochastic_bf16<Lanes>(x[v], r[v]), stochastic_bf16<Lanes>(x[v + 1], r[v + 1]));
      else
        narrow16(p, stochastic_bf16_no_nan<Lanes>(x[v], r[v]), stochastic_bf16_no_nan<Lanes>(x[v + 1], r[v + 1]));
    }
  }
#endif
  template <class T>
  static ZK_FN void store(T* p, const Out<T>& out) {
#if defined(__aarch64__)
    // Vector by vector, so that they come from registers: a tile's memcpy would be inlined as a copy of the stack.
    ZK_UNROLL
    for (int v = 0; v < int(sizeof out.element / 16); ++v)
      std::memcpy(reinterpret_cast<char*>(p) + 16 * v, reinterpret_cast<const char*>(out.element) + 16 * v, 16);
#else
    std::memcpy(p, out.element, sizeof out.element);
#endif
  }
  template <class T>
  static ZK_FN void store_part(T* p, const Out<T>& out, int lo, int hi) {
    std::memcpy(p + lo, out.element + lo, size_t(hi - lo) * sizeof(T));
  }
};

}  // namespace ZK_ISA
}  // namespace zk
