// Per-element arithmetic, one struct per rule: registers only. No rule sees lr, eps, a dtype, an address or a thread.
//
// A rule gets the weight after decay (w), the sums that tile.h has made of the directions, and its states:
//
//   kName         as in zokern/contract/rules.py
//   Perturbation  the rule that perturbs for this one in a chain
//   kDirect       the first coefficient goes straight onto the weight: w <- fma(coef, z, w) for each direction in order
//   kSums         further sums, each started at `start` and grown by fma(coef, z, sum), the one numbered kSquares by
//                 fma(coef, z*z, sum) instead (or, square_of_sum: fma(coef, z, sum), and squared at the end)
//   kStates       what is kept for each element; the first kWritten of them are written back
//   kHalfState    whether states may be bfloat16; all may be float32
//   kScalars      numbers that a parameter group shares; the first is the decay
//
// Other files know rules by the list at the end. Equations and sources: docs/methods.md. Every operation is one
// correctly rounded float32 operation, in this order.
#pragma once
#include "noise.h"

namespace zk {
namespace ZK_ISA {

// 1/sqrt(x) for normal x > 0, at most 1e-7 off, exactly 1 for 1; finite for x = 0. A seed 3.4 % off from the exponent,
// then y*(1 + e q(e)) with e = 1 - x y^2: a polynomial, because a GPU's own root is approximate or takes twice as long.
template <class L>
ZK_FN typename L::f32 inverse_root(typename L::f32 x) {
  using F = typename L::f32;
  const F y = L::as_float(0x5f374740u - (L::bits(x) >> 1));
  const F e = L::fma(-(x * y), y, L::all(1.f));
  F q = L::constant(0x3e8cc5e4u);
  q = L::fma(q, e, L::constant(0x3ea0bb6eu));
  q = L::fma(q, e, L::constant(0x3ebfffb3u));
  q = L::fma(q, e, L::constant(0x3effffc9u));
  return L::fma(y * e, q, y);
}

// 1/x for 1e-37 < x < 1e37, at most 6e-8 off: a seed 5 % off, three steps of Newton's.
template <class L>
ZK_FN typename L::f32 inverse(typename L::f32 x) {
  using F = typename L::f32;
  F y = L::as_float(0x7ef311c0u - L::bits(x));
  ZK_UNROLL
  for (int i = 0; i < 3; ++i) y = L::fma(y, L::fma(-x, y, L::all(1.f)), y);
  return y;
}

// Every first-order method: w + A.
struct Axpy {
  static constexpr const char* kName = "axpy";
  using Perturbation = Axpy;
  static constexpr bool kDirect = true, kHalfState = false;
  static constexpr int kSums = 0, kSquares = -1, kStates = 0, kWritten = 0, kScalars = 1;
  explicit ZK_FN Axpy(const float*) {}
  ZK_FN float start(int) const { return 0.f; }
  template <class L, class F = typename L::f32>
  ZK_FN void finish(F&, const F*, F*) const {}
};

// HiZOO's probe: w + A / sqrt(h).
struct ScaledAxpy {
  static constexpr const char* kName = "scaled_axpy";
  using Perturbation = ScaledAxpy;
  static constexpr bool kDirect = false, kHalfState = true;
  static constexpr int kSums = 1, kSquares = -1, kStates = 1, kWritten = 0, kScalars = 1;
  explicit ZK_FN ScaledAxpy(const float*) {}
  ZK_FN float start(int) const { return 0.f; }
  template <class L, class F = typename L::f32>
  ZK_FN void finish(F& w, const F* sum, F* h) const {
    w = L::fma(sum[0], inverse_root<L>(h[0]), w);
  }
};

// HiZOO's update: h' = h + h (V - a), within 2^-64 .. 2^64; w + A / sqrt(h) + G / sqrt(h'). The change of h is one fused
// operation because a, 1e-8, would vanish in 1 - a. Without kRestore there is no A: weights that are clean already.
template <bool kRestore>
struct HiZOO {
  static constexpr const char* kName = kRestore ? "hizoo_restore" : "hizoo";
  using Perturbation = ScaledAxpy;
  static constexpr bool kDirect = false, kHalfState = true;
  static constexpr int kSums = kRestore ? 3 : 2, kSquares = kSums - 1, kStates = 1, kWritten = 1, kScalars = 2;
  float smoothing;
  explicit ZK_FN HiZOO(const float* scalars) : smoothing(scalars[1]) {}
  ZK_FN float start(int sum) const { return sum == kSquares ? -smoothing : 0.f; }
  template <class L, class F = typename L::f32>
  ZK_FN void finish(F& w, const F* sum, F* h) const {
    if constexpr (kRestore) w = L::fma(sum[0], inverse_root<L>(h[0]), w);
    h[0] = L::fma(h[0], sum[kSquares], h[0]);
    h[0] = L::at_most(L::at_least(h[0], L::all(0x1p-64f)), L::all(0x1p64f));
    w = L::fma(sum[kSums - 2], inverse_root<L>(h[0]), w);
  }
};

// HELENE's update: m' = b1 m + G; h' = b2 h + V; w + A + step m' / (gamma max(h', floor) + delta).
struct Helene {
  static constexpr const char* kName = "helene";
  using Perturbation = Axpy;
  static constexpr bool kDirect = true, kHalfState = false;
  static constexpr int kSums = 2, kSquares = 1, kStates = 2, kWritten = 2, kScalars = 7;
  float beta1, beta2, step, gamma, floor, delta;
  explicit ZK_FN Helene(const float* s)
      : beta1(s[1]), beta2(s[2]), step(s[3]), gamma(s[4]), floor(s[5]), delta(s[6]) {}
  ZK_FN float start(int) const { return 0.f; }
  template <class L, class F = typename L::f32>
  ZK_FN void finish(F& w, const F* sum, F* x) const {
    x[0] = L::fma(L::all(beta1), x[0], sum[0]);
    x[1] = L::fma(L::all(beta2), x[1], sum[1]);
    const F below = L::fma(L::all(gamma), L::at_least(x[1], L::all(floor)), L::all(delta));
    w = L::fma(x[0] * L::all(step), inverse<L>(below), w);
  }
};

// Heavy ball: m' = b m + G; w + A + step m'.
struct Momentum {
  static constexpr const char* kName = "momentum";
  using Perturbation = Axpy;
  static constexpr bool kDirect = true, kHalfState = false;
  static constexpr int kSums = 1, kSquares = -1, kStates = 1, kWritten = 1, kScalars = 3;
  float beta, step;
  explicit ZK_FN Momentum(const float* s) : beta(s[1]), step(s[2]) {}
  ZK_FN float start(int) const { return 0.f; }
  template <class L, class F = typename L::f32>
  ZK_FN void finish(F& w, const F* sum, F* m) const {
    m[0] = L::fma(L::all(beta), m[0], sum[0]);
    w = L::fma(L::all(step), m[0], w);
  }
};

// Adam: m' = b1 m + G; v' = b2 v + r G^2; w + A + step m' / (sqrt(v') + delta). Bias corrections are in step and delta.
struct Adam {
  static constexpr const char* kName = "adam";
  using Perturbation = Axpy;
  static constexpr bool kDirect = true, kHalfState = false;
  static constexpr int kSums = 1, kSquares = -1, kStates = 2, kWritten = 2, kScalars = 6;
  float beta1, beta2, ratio, step, delta;
  explicit ZK_FN Adam(const float* s) : beta1(s[1]), beta2(s[2]), ratio(s[3]), step(s[4]), delta(s[5]) {}
  ZK_FN float start(int) const { return 0.f; }
  template <class L, class F = typename L::f32>
  ZK_FN void finish(F& w, const F* sum, F* x) const {
    x[0] = L::fma(L::all(beta1), x[0], sum[0]);
    x[1] = L::fma(sum[0] * L::all(ratio), sum[0], x[1] * L::all(beta2));
    const F below = L::fma(x[1], inverse_root<L>(x[1]), L::all(delta));  // sqrt(v') + delta, also for v' = 0
    w = L::fma(x[0] * L::all(step), inverse<L>(below), w);
  }
};

// AdaMeZO: both moments are sums over the last steps' directions: w + A + step G / sqrt(V + delta).
struct AdaMeZO {
  static constexpr const char* kName = "adamezo";
  using Perturbation = Axpy;
  static constexpr bool kDirect = true, kHalfState = false;
  static constexpr int kSums = 2, kSquares = 1, kStates = 0, kWritten = 0, kScalars = 3;
  float step, delta;
  explicit ZK_FN AdaMeZO(const float* s) : step(s[1]), delta(s[2]) {}
  ZK_FN float start(int sum) const { return sum == 1 ? delta : 0.f; }
  template <class L, class F = typename L::f32>
  ZK_FN void finish(F& w, const F* sum, F*) const {
    w = L::fma(sum[0] * L::all(step), inverse_root<L>(sum[1]), w);
  }
};

// w + A + step sign(G), sign(0) = 0.
struct Sign {
  static constexpr const char* kName = "sign";
  using Perturbation = Axpy;
  static constexpr bool kDirect = true, kHalfState = false;
  static constexpr int kSums = 1, kSquares = -1, kStates = 0, kWritten = 0, kScalars = 2;
  float step;
  explicit ZK_FN Sign(const float* s) : step(s[1]) {}
  ZK_FN float start(int) const { return 0.f; }
  template <class L, class F = typename L::f32>
  ZK_FN void finish(F& w, const F* sum, F*) const {
    const F zero = L::all(0.f), up = L::all(step), down = L::all(-step);
    const F change = L::where_above(sum[0], zero, up, zero);
    w = w + L::where_above(zero, sum[0], down, change);
  }
};

// Every rule. Its number is its place, as in zokern/contract/rules.py.
template <class... R>
struct Rules {};
using AllRules = Rules<Axpy, ScaledAxpy, HiZOO<false>, HiZOO<true>, Helene, Momentum, Adam, AdaMeZO, Sign>;

}  // namespace ZK_ISA
}  // namespace zk
