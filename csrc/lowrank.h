// Directions of low rank: how their factors are made, and z from them. docs/noise.md has the contract.
#pragma once
#include "rounding.h"

namespace zk {
namespace ZK_ISA {

// The nearest number that float32, bfloat16 and float16 all hold: a multiple of 2^-24 of 8 significant bits. Below
// 2^-17 all such multiples have fewer bits; from there on numbers of 8 bits are such multiples.
template <class L>
ZK_FN typename L::f32 factor(typename L::f32 x) {
  using F = typename L::f32;
  const F size = L::as_float(L::bits(x) & 0x7fffffffu), middle = L::all(0.75f);
  const F on_grid = (x + middle) - middle;  // 0.75 has 2^-24 in its last place
  const F y = L::where_above(L::all(0x1p-17f), size, on_grid, x);
  return L::as_float(nearest_bf16_no_nan<L>(y) << 16);
}

// A tile of U or V of one seed; where it lies is as for a tensor's noise.
template <class L, class Keys>
ZK_FN void factor_tile(typename L::f32 (&x)[L::kVectors], const FactorSide& side, float scale, uint64_t base,
                        uint32_t b, const Keys& keys) {
  Head head = chunk_head<kNormal>(base, uint32_t(side.id), keys);
  head.first_c2 ^= side.right != 0 ? kRight : kLeft;  // the purpose, which was 0
  normals_after<L>(x, base, b, head, keys);
  const auto by = L::all(side.right != 0 ? 1.f : scale);
  ZK_UNROLL
  for (int v = 0; v < L::kVectors; ++v) x[v] = factor<L>(x[v] * by);
}

// What draws a direction of low rank, in the place of a seed's keys: its factors of one tensor, in memory.
struct FactorsOfSeed {
  const float *left, *right;
  const FactorRow& shape;
  int32_t rank;
};

// The directions of a pass, by their factors.
template <class R>
struct LowRankSeeds {
  static constexpr bool kOne = false;
  const float* coefs;
  const float* values;
  const FactorRow& shape;
  int64_t of_seed;
  int32_t num_seeds, rank;
  template <class F>
  ZK_FN void each(const F& f) const {
    for (int k = 0; k < num_seeds; ++k) {
      const float* own = values + k * of_seed;
      f(FactorsOfSeed{own + shape.left, own + shape.right, shape, rank},
        [&](int c) ZK_LAMBDA { return coefs[c * num_seeds + k]; });
    }
  }
};

}  // namespace ZK_ISA
}  // namespace zk
