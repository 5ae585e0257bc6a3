// Per-element arithmetic, one struct per rule: registers only. No rule sees lr, eps, a dtype, an address or a thread.
#pragma once
#include "noise.h"

namespace zk {
namespace ZK_ISA {

// acc <- decay*w, then acc <- fma(coef_k, z_k, acc) for each direction in order. Every first-order method is this.
struct Axpy {
  template <class L>
  static ZK_FN typename L::f32 begin(typename L::f32 w, float decay) {
    return w * decay;  // exact for decay 1
  }
  template <class L>
  static ZK_FN typename L::f32 step(typename L::f32 acc, float coef, typename L::f32 z) {
    return L::fma(L::all(coef), z, acc);
  }
};

}  // namespace ZK_ISA
}  // namespace zk
