// The noise contract zk1: words, normals, signs and rounding bits. Shared by the CPU and the CUDA backend.
//
// z is a pure function of (seed, tensor id, global element index). Everything is templated on a lane bundle L, which is
// one element block per thread on a GPU (cuda/lanes.cuh; cuda/packed.cuh where float32 operations come in pairs) and a
// vector of blocks on a CPU (cpu/lanes.h). L supplies the types and a handful of operations; every float operation here
// is one correctly rounded IEEE-754 single operation, and nothing may be contracted (-ffp-contract=off, --fmad=false),
// which is why the bits are the same everywhere.
// Sources: Salmon et al. 2011 (Philox4x32-10), Box and Muller 1958; docs/noise.md.
#pragma once
#include <cstdint>

#include "pass.h"

#ifndef ZK_ISA
#error "define ZK_ISA, the namespace of this build: the same templates are compiled for several instruction sets"
#endif
#ifdef __CUDACC__
#define ZK_FN __device__ __forceinline__
#define ZK_OUTLINE __device__ __forceinline__
#define ZK_LAMBDA
#define ZK_UNROLL _Pragma("unroll")
#else
#define ZK_FN inline __attribute__((always_inline))
#define ZK_OUTLINE static __attribute__((noinline))
#define ZK_LAMBDA __attribute__((always_inline))
#define ZK_UNROLL _Pragma("GCC unroll 16")
#endif

namespace zk {
namespace ZK_ISA {

enum Purpose : uint32_t { kNormal = 0, kRounding = 1, kRademacher = 2, kLeft = 3, kRight = 4 };

// The key words of a round, from a seed or from a schedule made on the host (pass.h).
struct SeedKeys {
  uint32_t low, high;
  ZK_FN uint32_t k0(int round) const { return low + uint32_t(round) * 0x9E3779B9u; }
  ZK_FN uint32_t k1(int round) const { return high + uint32_t(round) * 0xBB67AE85u; }
};
struct HostKeys {
  const KeySchedule& schedule;
  ZK_FN uint32_t k0(int round) const { return schedule.k[round][0]; }
  ZK_FN uint32_t k1(int round) const { return schedule.k[round][1]; }
};

// What Philox' first three rounds take of the counter words c1, c2, c3 and the key, which are uniform over a chunk: two
// of the twenty products are in here.
struct Head {
  uint32_t first_c2, second_c0, second_c2, third_c2;  // each to be xored into the word of that name after that round
};
// Keys with the head of one purpose in a chunk, for loops out of which the compiler would not take it.
template <Purpose kPurpose>
struct ChunkKeys : HostKeys {
  Head head;
};
// Of the chunk at the global index `base`, in blocks of eight elements or, for signs, 128.
template <Purpose kPurpose, class Keys>
ZK_FN Head chunk_head(uint64_t base, uint32_t id, const Keys& keys) {
  const uint32_t c1 = uint32_t(base >> (kPurpose == kRademacher ? 39 : 35));
  const uint64_t p1 = uint64_t(id) * 0xCD9E8D57u;
  const uint64_t p0 = uint64_t(uint32_t(p1 >> 32) ^ c1 ^ keys.k0(0)) * 0xD2511F53u;  // of the second round
  return {kPurpose ^ keys.k1(0), uint32_t(p1) ^ keys.k0(1), uint32_t(p0 >> 32) ^ keys.k1(1), uint32_t(p0) ^ keys.k1(2)};
}
template <Purpose kPurpose>
ZK_FN Head chunk_head(uint64_t, uint32_t, const ChunkKeys<kPurpose>& keys) {
  return keys.head;
}

// The four words of L::kWidth consecutive blocks, in L::kSub groups, the first of them with the low counter word lo, a
// multiple of L::kWidth. Rounds run on lanes of 64 bits whose low 32 are the word; the high halves carry garbage that
// no product reads. All groups take a round together: one alone would leave a CPU waiting for its multiplications.
template <class L, class Keys>
ZK_FN void block_words(typename L::Word (&w)[L::kSub][4], uint32_t lo, const Head& head, const Keys& keys) {
  using U = typename L::u64;
  constexpr uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u;
  U c[L::kHalves][4];
  ZK_UNROLL
  for (int h = 0; h < L::kHalves; ++h) {
    const U p0 = L::mul(L::counter(lo, h), kM0), p1 = L::mul(L::high(p0) ^ uint64_t(head.first_c2), kM1);
    c[h][0] = L::high(p1) ^ uint64_t(head.second_c0);
    c[h][1] = p1;
    c[h][2] = p0 ^ uint64_t(head.second_c2);
  }
  ZK_UNROLL
  for (int round = 2; round < 10; ++round) {
    ZK_UNROLL
    for (int h = 0; h < L::kHalves; ++h) {
      const U p0 = L::mul(c[h][0], kM0), p1 = L::mul(c[h][2], kM1);
      c[h][0] = L::high(p1) ^ c[h][1] ^ uint64_t(keys.k0(round));
      c[h][1] = p1;
      c[h][2] = round == 2 ? L::high(p0) ^ uint64_t(head.third_c2) : L::high(p0) ^ c[h][3] ^ uint64_t(keys.k1(round));
      c[h][3] = p0;
    }
  }
  constexpr int kParts = L::kHalves / L::kSub;
  ZK_UNROLL
  for (int s = 0; s < L::kSub; ++s)
    ZK_UNROLL
    for (int j = 0; j < 4; ++j) w[s][j] = L::join(c[s * kParts][j], c[s * kParts + kParts - 1][j]);
}

// One word to two independent standard normals: radius from a bijection of the word, angle from the word itself.
template <class L>
ZK_FN void normal_pair(typename L::u32 w, typename L::f32& z0, typename L::f32& z1) {
  using F = typename L::f32;
  using U = typename L::u32;
  const F xf = L::to_float(w * 0x915f77f5u) + 0.5f;
  const U i = L::bits(xf);
  const F e = L::to_float(L::as_int(i - 0x4f800000u));
  const F m = L::as_float(L::insert_mantissa(i, 0x3f800000u));
  F p = L::constant(0xbd002f20u);
  p = L::fma(p, m, L::constant(0x3e94d03bu));
  p = L::fma(p, m, L::constant(0xbf91a12fu));
  p = L::fma(p, m, L::constant(0x401e51d6u));
  p = L::fma(p, m, L::constant(0xc03630f9u));
  p = L::fma(p, m, L::constant(0x3fa02ce3u));
  const F h = L::fma(e, L::constant(0xb3b17218u), p);              // -ln((x + 1/2) / 2^32)
  const F y = L::as_float(0x5eec0000u - (L::bits(h) >> 1));         // 1/sqrt(2h), 4 % off
  const F s = h * y, v = s * y;
  F g = L::fma(v, L::constant(0x407b6a77u), L::constant(0xc0bc39e4u));
  g = L::fma(g, v, L::constant(0x407d6a5au));
  const F r = s * g;                                                // sqrt(2h)
  const F t = L::to_float(L::as_int(w)) * 0x1p-32f, q = t * t;      // the angle in turns
  F c = L::constant(0xc1a89d40u);                                   // cos(2 pi t)
  c = L::fma(c, q, L::constant(0x426b2d19u));
  c = L::fma(c, q, L::constant(0xc2aa8b78u));
  c = L::fma(c, q, L::constant(0x4281db82u));
  c = L::fma(c, q, L::constant(0xc19de970u));
  c = L::fma(c, q, L::constant(0x3f7ffff3u));
  F d = L::constant(0x42032028u);                                   // sin(2 pi t) / t
  d = L::fma(d, q, L::constant(0xc294f4bdu));
  d = L::fma(d, q, L::constant(0x42a2bbcfu));
  d = L::fma(d, q, L::constant(0xc225532au));
  d = L::fma(d, q, L::constant(0x40c90ecbu));
  L::times(z0, z1, r, c, d * t);                                    // r cos, r sin
}

// A tile is 8 * L::kWidth consecutive elements, as L::kVectors vectors in memory order or, where a vector holds L::kPack
// elements of one block, in the order of cuda/packed.cuh. Its first global index is base + 8*b: base, a multiple of 2^14,
// is uniform over a chunk (so c1 is), and b < 2^11 counts blocks of eight in it.

template <class L, class Keys>
ZK_FN void normals_after(typename L::f32 (&z)[L::kVectors], uint64_t base, uint32_t b, const Head& head,
                         const Keys& keys) {
  constexpr int kPack = L::kPack, kEight = 8 / kPack;
  typename L::Word w[L::kSub][4];
  block_words<L>(w, uint32_t(base >> 3) + b, head, keys);
  ZK_UNROLL
  for (int s = 0; s < L::kSub; ++s) {
    typename L::f32* out = z + kEight * s;
    ZK_UNROLL
    for (int j = 0; j < 4; j += kPack) normal_pair<L>(L::words(w[s] + j), out[2 * j / kPack], out[2 * j / kPack + 1]);
    L::to_memory_order(out);
  }
}
template <class L, class Keys>
ZK_FN void normals(typename L::f32 (&z)[L::kVectors], uint64_t base, uint32_t b, uint32_t id, const Keys& keys) {
  normals_after<L>(z, base, b, chunk_head<kNormal>(base, id, keys), keys);
}

// A 128-bit block serves 128 signs, so a group of vectors needs one block or a part of one, which is scalar work.
template <class L, class Keys>
ZK_FN void unpacked_signs(typename L::f32 (&z)[L::kVectors], uint64_t base, uint32_t b, uint32_t id, const Keys& keys) {
  constexpr int kLanes = L::kWidth / L::kSub;
  constexpr int kShare = kLanes < 4 ? 8 : 32 / kLanes;  // vectors that share a word: all 8, or 32 bits' worth
  const Head head = chunk_head<kRademacher>(base, id, keys);
  uint32_t w[1][4];
  ZK_UNROLL
  for (int s = 0; s < L::kSub; ++s) {
    const uint32_t first = b + uint32_t(s * kLanes);
    if (s * kLanes % 16 == 0)  // b is a multiple of kWidth: the other groups lie in the block before
      block_words<typename L::Scalar>(w, uint32_t(base >> 7) + (first >> 4), head, keys);
    ZK_UNROLL
    for (int v = 0; v < 8; v += kShare) {
      const uint32_t bit = 8 * (first & 15) + uint32_t(v * kLanes);  // of the vector's first element
      const uint32_t even = bit & 64 ? w[0][2] : w[0][0], odd = bit & 64 ? w[0][3] : w[0][1];
      const uint32_t word = (bit & 32 ? odd : even) >> (bit & 31);
      ZK_UNROLL
      for (int i = 0; i < kShare; ++i)  // the wanted bit of each lane becomes the sign of 1.0f
        z[8 * s + v + i] = L::signed_one(L::splat(word) << (31u - uint32_t(i * kLanes) - L::iota()));
    }
  }
}
template <class L, class Keys>
ZK_FN void signs(typename L::f32 (&z)[L::kVectors], uint64_t base, uint32_t b, uint32_t id, const Keys& keys) {
  if constexpr (L::kPack == 1) {
    unpacked_signs<L>(z, base, b, id, keys);
  } else {
    typename L::Scalar::f32 eight[8];
    unpacked_signs<typename L::Scalar>(eight, base, b, id, keys);
    L::pack(z, eight);
  }
}

// The words that round a tile, and the 16 bits of each element in them: word j serves elements 2j (low half) and 2j + 1.
template <class L, class Keys>
ZK_FN void rounding_words(typename L::Word (&w)[L::kSub][4], uint64_t base, uint32_t b, uint32_t id, const Keys& keys) {
  block_words<L>(w, uint32_t(base >> 3) + b, chunk_head<kRounding>(base, id, keys), keys);
}
template <class L>
ZK_FN void rounding_bits(typename L::u32* bits, const typename L::u32 (&w)[4]) {
  ZK_UNROLL
  for (int j = 0; j < 4; ++j) {
    bits[2 * j] = w[j] & 0xffffu;
    bits[2 * j + 1] = w[j] >> 16;
  }
  L::to_memory_order(bits);
}

}  // namespace ZK_ISA
}  // namespace zk
