// One tile of a pass: load its vectors, apply the rule, round once, store. 8 elements per thread on a GPU, 16 * W on a
// CPU with W lanes. L hides dtypes and alignment behind load and store; `lo`, `hi` cut a tile at a tensor's ends.
#pragma once
#include "pass.h"
#include "rounding.h"
#include "rules.h"

namespace zk {
namespace ZK_ISA {

// Coefficients of a direction: one for the weight itself if the rule is direct, one for each of its sums.
template <class R>
constexpr int kCoefs = int(R::kDirect) + R::kSums;

// The directions of a pass: one whose seed the host knew, the common case, or any number from wherever they are.
template <class R>
struct OneSeed {
  HostKeys keys;
  float coef[kCoefs<R>];
  ZK_FN OneSeed(const Pass& pass, const float* coefs) : keys{pass.first_keys} {
    ZK_UNROLL
    for (int c = 0; c < kCoefs<R>; ++c) coef[c] = coefs[c];
  }
  template <class F>
  ZK_FN void each(const F& f) const {
    f(keys, [&](int c) ZK_LAMBDA { return coef[c]; });
  }
};
struct ManySeeds {
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

// Calls f with the uniform that lets the loop over whole tiles do the least work.
template <class R, class F>
ZK_FN void with_uniform(const Pass& pass, const AnyUniform<R>& any, const F& f) {
  if (pass.num_seeds != 1 || pass.seeds != nullptr || pass.rounding_seed != nullptr) return f(any);
  const OneSeed<R> one(pass, any.seeds.coefs);
  const HostKeys rounding{pass.rounding_keys}, state{pass.state_keys};
  if (any.decay.factor == 1.f)
    f(Uniform<R, NoDecay, OneSeed<R>, HostKeys>{pass, any.id, any.rule, {}, one, rounding, state});
  else
    f(Uniform<R, Decay, OneSeed<R>, HostKeys>{pass, any.id, any.rule, any.decay, one, rounding, state});
}

// A function of its own on a CPU: the noise inlined into every rule would be most of the compiled module.
template <class L, class Keys>
ZK_OUTLINE void draw_any(typename L::f32 (&z)[L::kVectors], bool rademacher, uint64_t base, uint32_t b, uint32_t id,
                         const Keys& keys) {
  if (rademacher)
    signs<L>(z, base, b, id, keys);
  else
    normals<L>(z, base, b, id, keys);
}
template <class L, Distribution D, class P, class Keys>
ZK_FN void draw(typename L::f32 (&z)[L::kVectors], const P& pass, uint64_t base, uint32_t b, uint32_t id,
                const Keys& keys) {
  if constexpr (D == Distribution::any)
    draw_any<L>(z, pass.rademacher != 0, base, b, id, keys);
  else if constexpr (D == Distribution::rademacher)
    signs<L>(z, base, b, id, keys);
  else
    normals<L>(z, base, b, id, keys);
}

// Rounds x once, to T's storage.
template <class L, Rounding Q, class T, class Keys>
ZK_FN void round_inline(typename L::template Out<T>& out, const typename L::f32 (&x)[L::kVectors], bool stochastic,
                        uint64_t base, uint32_t b, uint32_t id, const Keys& keys) {
  if constexpr (sizeof(T) == 2 && Q != Rounding::nearest) {
    if (Q == Rounding::stochastic || stochastic) {
      typename L::u32 words[L::kSub][4];
      rounding_words<L>(words, base, b, id, keys);
      return L::round(out, x, words);
    }
  }
  L::round(out, x);
}
template <class L, class T, class Keys>
ZK_OUTLINE void round_any(typename L::template Out<T>& out, const typename L::f32 (&x)[L::kVectors], bool stochastic,
                          uint64_t base, uint32_t b, uint32_t id, const Keys& keys) {
  round_inline<L, Rounding::any, T>(out, x, stochastic, base, b, id, keys);
}
template <class L, Rounding Q, class T, class Keys>
ZK_FN void round_tile(typename L::template Out<T>& out, const typename L::f32 (&x)[L::kVectors], bool stochastic,
                      uint64_t base, uint32_t b, uint32_t id, const Keys& keys) {
  if constexpr (Q == Rounding::any && sizeof(T) == 2)
    round_any<L, T>(out, x, stochastic, base, b, id, keys);
  else
    round_inline<L, Q, T>(out, x, stochastic, base, b, id, keys);
}

// Where a tile's elements are. S is the storage of the rule's states.
template <class T, class S>
struct Places {
  const T* src;
  T* dst;
  S* state[2];
};

// The places of the element with the global index `index`, which may lie before the tensor where a tile is cut.
template <class T, class S, class R>
ZK_FN Places<T, S> places(const TensorRow& t, int64_t index) {
  const int64_t at = index - t.offset;
  Places<T, S> p{reinterpret_cast<const T*>(t.src + at * int64_t(sizeof(T))),
                 reinterpret_cast<T*>(t.dst + at * int64_t(sizeof(T))),
                 {}};
  ZK_UNROLL
  for (int i = 0; i < R::kStates; ++i) p.state[i] = reinterpret_cast<S*>(t.state[i] + at * int64_t(sizeof(S)));
  return p;
}

template <class L, bool kCut, class T>
ZK_FN void load_tile(typename L::f32 (&x)[L::kVectors], const T* p, int lo, int hi) {
  if constexpr (kCut)
    L::load_part(x, p, lo, hi);
  else
    L::load(x, p);
}
template <class L, bool kCut, class T>
ZK_FN void store_tile(T* p, const typename L::template Out<T>& out, int lo, int hi) {
  if constexpr (kCut)
    L::store_part(p, out, lo, hi);
  else
    L::store(p, out);
}

// f(v) for each vector of a tile. A CPU keeps the first-order pass in registers, which takes unrolling; other rules have
// more numbers than registers anyhow, and a loop keeps the module small.
template <class L, class R, class F>
ZK_FN void each_vector(const F& f) {
  if constexpr (L::kWidth == 1 || R::kSums == 0) {
    ZK_UNROLL
    for (int v = 0; v < L::kVectors; ++v) f(v);
  } else {
    for (int v = 0; v < L::kVectors; ++v) f(v);
  }
}

// The rule on a tile's weights w, before their rounding: decay, every direction, and the states x, which `load_states`
// provides when they are needed.
template <class L, class R, Distribution D, class U, class F = typename L::f32, int N, class Load>
ZK_FN void apply(const U& u, F (&w)[L::kVectors], F (&x)[N][L::kVectors], uint64_t base, uint32_t b,
                 const Load& load_states) {
  constexpr int V = L::kVectors, kArrays = R::kSums > 0 ? R::kSums : 1, kStates = R::kStates > 0 ? R::kStates : 1;
  F sum[kArrays][V];
  each_vector<L, R>([&](int v) ZK_LAMBDA { w[v] = u.decay.template apply<L>(w[v]); });
  // A square of a sum starts from nothing, and takes the sum's own start when it is squared.
  const bool square_of_sum = R::kSquares >= 0 && u.pass.square_of_sum != 0;
  ZK_UNROLL
  for (int s = 0; s < R::kSums; ++s) {
    const F start = L::all(s == R::kSquares && square_of_sum ? 0.f : u.rule.start(s));
    each_vector<L, R>([&](int v) ZK_LAMBDA { sum[s][v] = start; });
  }
  u.seeds.each([&](const auto& keys, const auto& coef) ZK_LAMBDA {
    F z[V];
    draw<L, D>(z, u.pass, base, b, u.id, keys);
    if constexpr (R::kDirect) {
      const F first = L::all(coef(0));
      each_vector<L, R>([&](int v) ZK_LAMBDA { w[v] = L::fma(first, z[v], w[v]); });
    }
    ZK_UNROLL
    for (int s = 0; s < R::kSums; ++s) {
      const F c = L::all(coef(int(R::kDirect) + s));
      if (s == R::kSquares && !square_of_sum)
        each_vector<L, R>([&](int v) ZK_LAMBDA { sum[s][v] = L::fma(c, z[v] * z[v], sum[s][v]); });
      else
        each_vector<L, R>([&](int v) ZK_LAMBDA { sum[s][v] = L::fma(c, z[v], sum[s][v]); });
    }
  });
  if (square_of_sum) {
    constexpr int q = R::kSquares >= 0 ? R::kSquares : 0;
    const F start = L::all(u.rule.start(q));
    each_vector<L, R>([&](int v) ZK_LAMBDA { sum[q][v] = L::fma(sum[q][v], sum[q][v], start); });
  }
  load_states();
  each_vector<L, R>([&](int v) ZK_LAMBDA {
    F sums[kArrays], states[kStates];
    ZK_UNROLL
    for (int s = 0; s < R::kSums; ++s) sums[s] = sum[s][v];
    ZK_UNROLL
    for (int i = 0; i < R::kStates; ++i) states[i] = x[i][v];
    u.rule.template finish<L>(w[v], sums, states);
    ZK_UNROLL
    for (int i = 0; i < R::kWritten; ++i) x[i][v] = states[i];
  });
}

// The tile's first global index is base + 8*b (see noise.h), and p points `at` elements before it. A cut tile touches
// its elements [lo, hi) only.
template <class L, class T, class S, class R, Distribution D, Rounding Q, bool kCut, class U>
ZK_FN void rule_tile(const U& u, const Places<T, S>& p, int64_t at, uint64_t base, uint32_t b, int lo, int hi) {
  using F = typename L::f32;
  constexpr int kStates = R::kStates > 0 ? R::kStates : 1;
  F w[L::kVectors], x[kStates][L::kVectors];
  load_tile<L, kCut>(w, p.src + at, lo, hi);
  apply<L, R, D>(u, w, x, base, b, [&]() ZK_LAMBDA {
    ZK_UNROLL
    for (int i = 0; i < R::kStates; ++i) load_tile<L, kCut>(x[i], p.state[i] + at, lo, hi);
  });
  typename L::template Out<T> out;
  round_tile<L, Q, T>(out, w, u.pass.stochastic != 0, base, b, u.id, u.rounding_keys);
  store_tile<L, kCut>(p.dst + at, out, lo, hi);
  ZK_UNROLL
  for (int i = 0; i < R::kWritten; ++i) {
    if (i == 1 && u.pass.keep_second != 0) continue;
    typename L::template Out<S> state;
    round_tile<L, Rounding::any, S>(state, x[i], true, base, b, u.id, u.state_keys);
    store_tile<L, kCut>(p.state[i] + at, state, lo, hi);
  }
}

}  // namespace ZK_ISA
}  // namespace zk
