// One tile of a pass: load its vectors, apply the rule, round once, store. 8 elements per thread on a GPU, 16 * W on a
// CPU with W lanes. L hides dtypes and alignment behind load and store; `lo`, `hi` cut a tile at a tensor's ends.
#pragma once
#include "pass.h"
#include "rounding.h"
#include "rules.h"

namespace zk {
namespace ZK_ISA {

// The directions of a pass: one whose seed the host knew, the common case, or any number from wherever they are.
struct OneSeed {
  HostKeys keys;
  float coef;
  ZK_FN OneSeed(const Pass& pass, const float* coefs) : keys{pass.first_keys}, coef(coefs[0]) {}
  template <class F>
  ZK_FN void each(const F& f) const {
    f(keys, coef);
  }
};
struct ManySeeds {
  const uint32_t* seeds;  // two words each
  const float* coefs;
  int32_t num_seeds;
  template <class F>
  ZK_FN void each(const F& f) const {
    for (int k = 0; k < num_seeds; ++k) f(SeedKeys{seeds[2 * k], seeds[2 * k + 1]}, coefs[k]);
  }
};

template <class L, Distribution D, class Keys>
ZK_FN void draw(typename L::f32 (&z)[L::kVectors], uint64_t base, uint32_t b, uint32_t id, const Keys& keys) {
  if constexpr (D == Distribution::normal)
    normals<L>(z, base, b, id, keys);
  else
    signs<L>(z, base, b, id, keys);
}

struct NoDecay {
  template <class L>
  ZK_FN typename L::f32 apply(typename L::f32 w) const {
    return w;
  }
};
struct Decay {
  float factor;
  template <class L>
  ZK_FN typename L::f32 apply(typename L::f32 w) const {
    return Axpy::begin<L>(w, factor);
  }
};

// What is uniform over a chunk: the tensor's id, its group's decay, the directions and the keys of the rounding.
template <class DecayT, class Seeds, class RoundingKeys>
struct Uniform {
  uint32_t id;
  DecayT decay;
  Seeds seeds;
  RoundingKeys rounding_keys;
};
using AnyUniform = Uniform<Decay, ManySeeds, SeedKeys>;

// Fits every pass.
ZK_FN AnyUniform any_uniform(const Pass& pass, const TensorRow& t) {
  const uint32_t* seeds = pass.seeds != nullptr ? reinterpret_cast<const uint32_t*>(pass.seeds) : pass.first_keys.k[0];
  const uint32_t* rounding =
      pass.rounding_seed != nullptr ? reinterpret_cast<const uint32_t*>(pass.rounding_seed) : pass.rounding_keys.k[0];
  const ManySeeds many{seeds, pass.coefs + t.group * pass.num_seeds, pass.num_seeds};
  return {uint32_t(t.id), {pass.decays[t.group]}, many, {rounding[0], rounding[1]}};
}

// Calls f with the uniform that lets the loop over whole tiles do the least work.
template <class F>
ZK_FN void with_uniform(const Pass& pass, const AnyUniform& any, const F& f) {
  if (pass.num_seeds != 1 || pass.seeds != nullptr || pass.rounding_seed != nullptr) return f(any);
  const OneSeed one(pass, any.seeds.coefs);
  const HostKeys rounding{pass.rounding_keys};
  if (any.decay.factor == 1.f)
    f(Uniform<NoDecay, OneSeed, HostKeys>{any.id, {}, one, rounding});
  else
    f(Uniform<Decay, OneSeed, HostKeys>{any.id, any.decay, one, rounding});
}

// The tile's first global index is base + 8*b (see noise.h), and src and dst point at that element. A cut tile touches
// its elements [lo, hi) only.
template <class L, class T, Distribution D, Rounding R, bool kCut, class U>
ZK_FN void axpy_tile(const U& u, const T* src, T* dst, uint64_t base, uint32_t b, int lo, int hi) {
  typename L::f32 acc[L::kVectors];
  if constexpr (kCut)
    L::load_part(acc, src, lo, hi);
  else
    L::load(acc, src);
  ZK_UNROLL
  for (int v = 0; v < L::kVectors; ++v) acc[v] = u.decay.template apply<L>(acc[v]);
  u.seeds.each([&](const auto& keys, float coef) ZK_LAMBDA {
    typename L::f32 z[L::kVectors];
    draw<L, D>(z, base, b, u.id, keys);
    ZK_UNROLL
    for (int v = 0; v < L::kVectors; ++v) acc[v] = Axpy::step<L>(acc[v], coef, z[v]);
  });
  typename L::template Out<T> out;
  if constexpr (R == Rounding::stochastic) {
    typename L::u32 words[L::kSub][4];
    rounding_words<L>(words, base, b, u.id, u.rounding_keys);
    L::round(out, acc, words);
  } else {
    L::round(out, acc);
  }
  if constexpr (kCut)
    L::store_part(dst, out, lo, hi);
  else
    L::store(dst, out);
}

}  // namespace ZK_ISA
}  // namespace zk
