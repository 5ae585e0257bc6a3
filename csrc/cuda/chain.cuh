// One tile of a chain (../pass.h): load, take every stage in registers, each with its own rounding, and store once.
// `Stages` is where a traversal keeps the stages' numbers: uniform<R>(i) is stage i as tile.h's Uniform,
// chain.stages[i] its flags.
#pragma once
#include <type_traits>

#include "kernels.cuh"

namespace zk {
namespace ZK_ISA {

template <class R>
using Perturbation = typename R::Perturbation;

// What a stage tells tile.h of itself.
struct StageKind {
  int32_t rademacher, stochastic, square_of_sum;
  ZK_FN StageKind(const Chain& chain, const Stage& stage)
      : rademacher(chain.rademacher), stochastic(stage.stochastic), square_of_sum(stage.square_of_sum) {}
};

// x <- T(x), in float32 again: what a pass would have stored and the next one loaded.
template <class L, class T, class Keys>
ZK_FN void round_in_place(typename L::f32 (&x)[L::kVectors], bool stochastic, uint64_t base, uint32_t b, uint32_t id,
                           const Keys& keys) {
  if constexpr (sizeof(T) == 2) {
    typename L::template Out<T> out;
    round_tile<L, Rounding::any, T>(out, x, stochastic, base, b, id, keys);
    L::widen(x, out);
  }
}

template <class L, class T, class S, class R, bool kCut, Distribution D = Distribution::any, class Stages>
ZK_FN void chain_tile(const Chain& chain, bool enabled, const Stages& stages, const Places<T, S>& p, T* probe,
                       int64_t at, uint64_t base, uint32_t b, int lo, int hi) {
  using F = typename L::f32;
  using P = Perturbation<R>;
  constexpr int kStates = R::kStates > 0 ? R::kStates : 1;
  F w[L::kVectors], x[kStates][L::kVectors];
  load_tile<L, kCut>(w, p.src + at, lo, hi);
  ZK_UNROLL
  for (int i = 0; i < R::kStates; ++i) load_tile<L, kCut>(x[i], p.state[i] + at, lo, hi);
  const auto store = [&]() ZK_LAMBDA {
    typename L::template Out<T> out;
    L::round(out, w);  // exact: w has been rounded
    store_tile<L, kCut>(p.dst + at, out, lo, hi);
    ZK_UNROLL
    for (int s = 0; s < R::kWritten; ++s) {
      if (s == 1 && chain.keep_second != 0) continue;
      typename L::template Out<S> state;
      L::round(state, x[s]);
      store_tile<L, kCut>(p.state[s] + at, state, lo, hi);
    }
  };
  const int fork = chain.num_stages - chain.fork;  // the stage that goes to the probe, or none
#ifdef __CUDACC__
#pragma unroll 1
#endif
  for (int i = enabled ? 0 : fork; i < chain.num_stages; ++i) {
    if (i == fork) {
      if (enabled) store();
      if (probe == nullptr) return;
    }
    const StageKind kind(chain, chain.stages[i]);
    const auto loaded = []() ZK_LAMBDA {};
    if (!std::is_same<P, R>::value && chain.stages[i].perturbs != 0) {
      const auto u = stages.template uniform<P>(i, kind);
      apply<L, P, D>(u, w, x, base, b, loaded);
      round_in_place<L, T>(w, kind.stochastic != 0, base, b, u.id, u.rounding_keys);
      continue;
    }
    const auto u = stages.template uniform<R>(i, kind);
    F kept[L::kVectors];
    if constexpr (R::kWritten == 2) {
      ZK_UNROLL
      for (int v = 0; v < L::kVectors; ++v) kept[v] = x[1][v];
    }
    apply<L, R, D>(u, w, x, base, b, loaded);
    if constexpr (R::kWritten == 2) {
      if (chain.stages[i].keep_second != 0) {
        ZK_UNROLL
        for (int v = 0; v < L::kVectors; ++v) x[1][v] = kept[v];
      }
    }
    round_in_place<L, T>(w, kind.stochastic != 0, base, b, u.id, u.rounding_keys);
    ZK_UNROLL
    for (int s = 0; s < R::kWritten; ++s) round_in_place<L, S>(x[s], true, base, b, u.id, u.state_keys);
  }
  if (chain.fork == 0) return store();
  typename L::template Out<T> out;
  L::round(out, w);
  store_tile<L, kCut>(probe + at, out, lo, hi);
}

}  // namespace ZK_ISA
}  // namespace zk
