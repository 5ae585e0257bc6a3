// One tile of a pass: load its vectors, apply the rule, round once, store. 8 elements per thread on a GPU, 16 * W on a
// CPU with W lanes. L hides dtypes and alignment behind load and store; `lo`, `hi` cut a tile at a tensor's ends.
#pragma once
#include "lowrank.h"
#include "uniform.h"

namespace zk {
namespace ZK_ISA {

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
  if constexpr (D == Distribution::low_rank)
    L::products(z, base, b, keys);  // keys are the factors
  else if constexpr (D == Distribution::any)
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
      typename L::Word words[L::kSub][4];
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

// The sums of one direction, of one vector of it.
template <class L, class R, class U, class Coef>
ZK_FN void sums_of_one(typename L::f32* sums, typename L::f32 z, const U& u, bool square_of_sum, const Coef& coef) {
  ZK_UNROLL
  for (int s = 0; s < R::kSums; ++s) {
    const auto c = L::all(coef(int(R::kDirect) + s)), start = L::all(u.rule.start(s));
    if (s != R::kSquares)
      sums[s] = L::fma(c, z, start);
    else if (!square_of_sum)
      sums[s] = L::fma(c, z * z, start);
    else
      sums[s] = L::fma(c, z, L::all(0.f)), sums[s] = L::fma(sums[s], sums[s], start);
  }
}

// The sums of many directions, of all vectors.
template <class L, class R, Distribution D, class F, int V, class U>
ZK_FN void sums_of_many(F (&w)[V], F (*sum)[V], const U& u, bool square_of_sum, uint64_t base, uint32_t b) {
  // A square of a sum starts from nothing, and takes the sum's own start when it is squared.
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
}

// The rule on a tile's weights w, before their rounding: decay, every direction, and the states x, which `load_states`
// provides when they are needed. The tile's first global index is base + 8*b (see noise.h).
template <class L, class R, Distribution D, class U, class F = typename L::f32, int N, class Load>
ZK_FN void apply(const U& u, F (&w)[L::kVectors], F (&x)[N][L::kVectors], uint64_t base, uint32_t b,
                 const Load& load_states) {
  constexpr int V = L::kVectors, kArrays = R::kSums > 0 ? R::kSums : 1, kStates = R::kStates > 0 ? R::kStates : 1;
  const bool square_of_sum = R::kSquares >= 0 && u.pass.square_of_sum != 0;
  each_vector<L, R>([&](int v) ZK_LAMBDA { w[v] = u.decay.template apply<L>(w[v]); });

  // With sums_of(v, sums), which also moves w[v] by a direct rule's directions.
  const auto finish = [&](const auto& sums_of) ZK_LAMBDA {
    load_states();
    each_vector<L, R>([&](int v) ZK_LAMBDA {
      F sums[kArrays], states[kStates];
      sums_of(v, sums);
      ZK_UNROLL
      for (int i = 0; i < R::kStates; ++i) states[i] = x[i][v];
      u.rule.template finish<L>(w[v], sums, states);
      ZK_UNROLL
      for (int i = 0; i < R::kWritten; ++i) x[i][v] = states[i];
    });
  };
  if constexpr (U::kOneSeed) {
    // The sums of an element are made when it is finished: fewer numbers in registers than the sums of all.
    u.seeds.each([&](const auto& keys, const auto& coef) ZK_LAMBDA {
      F z[V];
      draw<L, D>(z, u.pass, base, b, u.id, keys);
      finish([&](int v, F* sums) ZK_LAMBDA {
        if constexpr (R::kDirect) w[v] = L::fma(L::all(coef(0)), z[v], w[v]);
        sums_of_one<L, R>(sums, z[v], u, square_of_sum, coef);
      });
    });
  } else {
    F sum[kArrays][V];
    sums_of_many<L, R, D>(w, sum, u, square_of_sum, base, b);
    finish([&](int v, F* sums) ZK_LAMBDA {
      ZK_UNROLL
      for (int s = 0; s < R::kSums; ++s) sums[s] = sum[s][v];
    });
  }
}

// Loads, applies, rounds, stores. p points `at` elements before the tile; a cut one touches its elements [lo, hi) only.
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
