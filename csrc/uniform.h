// What is the same for all tiles of a chunk, and lies in registers: the directions, the rule with its scalars, the
// decay, the keys of the roundings. The fewer of these a pass leaves open, the less a tile has to do: with_uniform
// chooses.
#pragma once
#include "lowrank.h"
#include "rules.h"

namespace zk {
namespace ZK_ISA {

// Coefficients of a direction: one for the weight itself if the rule is direct, one for each of its sums.
template <class R>
constexpr int kCoefs = int(R::kDirect) + R::kSums;

// The directions of a pass: one whose seed the host knew, the common case, or any number from wherever they are.
template <class R, class Keys = HostKeys>
struct OneSeed {
  static constexpr bool kOne = true;
  Keys keys;
  float coef[kCoefs<R>];
  ZK_FN OneSeed(const Keys& keys, const float* coefs) : keys(keys) {
    ZK_UNROLL
    for (int c = 0; c < kCoefs<R>; ++c) coef[c] = coefs[c];
  }
  template <class F>
  ZK_FN void each(const F& f) const {
    f(keys, [&](int c) ZK_LAMBDA { return coef[c]; });
  }
};
struct ManySeeds {
  static constexpr bool kOne = false;
  const uint32_t* seeds;  // two words each
  const float* coefs;
  int32_t num_seeds;
  template <class F>
  ZK_FN void each(const F& f) const {
    for (int k = 0; k < num_seeds; ++k)
      f(SeedKeys{seeds[2 * k], seeds[2 * k + 1]}, [&](int c) ZK_LAMBDA { return coefs[c * num_seeds + k]; });
  }
};

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
    return w * factor;  // exact for 1
  }
};

// What is uniform over a chunk: the tensor's id, its group's scalars, the directions and the keys of the roundings. P is
// the pass, or what a kernel for one kind of pass still asks it.
template <class R, class DecayT, class Seeds, class RoundingKeys, class P = Pass>
struct Uniform {
  static constexpr bool kOneSeed = Seeds::kOne;
  const P& pass;
  uint32_t id;
  R rule;
  DecayT decay;
  Seeds seeds;
  RoundingKeys rounding_keys, state_keys;
};
template <class R>
using AnyUniform = Uniform<R, Decay, ManySeeds, SeedKeys>;

// Fits every pass.
template <class R>
ZK_FN AnyUniform<R> any_uniform(const Pass& pass, const TensorRow& t) {
  const uint32_t* seeds = pass.seeds != nullptr ? reinterpret_cast<const uint32_t*>(pass.seeds) : pass.first_keys.k[0];
  const uint32_t* rounding = reinterpret_cast<const uint32_t*>(pass.rounding_seed);
  const bool known = pass.rounding_seed == nullptr;
  const uint32_t* own = known ? pass.rounding_keys.k[0] : rounding;
  const uint32_t* state = known || R::kWritten == 0 ? pass.state_keys.k[0] : rounding + 2;
  const float* scalars = pass.scalars + t.group * R::kScalars;
  const ManySeeds many{seeds, pass.coefs + t.group * pass.num_seeds * kCoefs<R>, pass.num_seeds};
  return {pass, uint32_t(t.id), R(scalars), {scalars[0]}, many, {own[0], own[1]}, {state[0], state[1]}};
}

// The same for directions of low rank. row: of the tensor, among the pass' rows.
template <class R>
using LowRankUniform = Uniform<R, Decay, LowRankSeeds<R>, SeedKeys>;
template <class R>
ZK_FN LowRankUniform<R> low_rank_uniform(const Pass& pass, int row) {
  const AnyUniform<R> any = any_uniform<R>(pass, pass.tensors[row]);
  const Factors& of = pass.factors;
  return {pass, any.id, any.rule, any.decay,
          {any.seeds.coefs, of.values, of.rows[row], of.of_seed, pass.num_seeds, of.rank},
          any.rounding_keys, any.state_keys};
}

// Calls f with the uniform that lets the loop over whole tiles do the least work.
template <class R, class F>
ZK_FN void with_uniform(const Pass& pass, const AnyUniform<R>& any, const F& f) {
  if (pass.num_seeds != 1 || pass.seeds != nullptr || pass.rounding_seed != nullptr) return f(any);
  const OneSeed<R> one(HostKeys{pass.first_keys}, any.seeds.coefs);
  const HostKeys rounding{pass.rounding_keys}, state{pass.state_keys};
  if (any.decay.factor == 1.f)
    f(Uniform<R, NoDecay, OneSeed<R>, HostKeys>{pass, any.id, any.rule, {}, one, rounding, state});
  else
    f(Uniform<R, Decay, OneSeed<R>, HostKeys>{pass, any.id, any.rule, any.decay, one, rounding, state});
}

}  // namespace ZK_ISA
}  // namespace zk
