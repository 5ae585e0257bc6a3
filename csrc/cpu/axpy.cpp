// The first-order pass on the CPU, which most steps consist of: one instance for each distribution and rounding.
#include "traverse.h"

namespace zk {
namespace ZK_ISA {

template <class T, class S, class R, Distribution D>
static void rounded(const Pass& pass, int64_t first, int64_t last) {
  if constexpr (sizeof(T) == 2) {
    if (pass.stochastic != 0) return rule_chunks<T, S, R, D, Rounding::stochastic>(pass, first, last);
  }
  rule_chunks<T, S, R, D, Rounding::nearest>(pass, first, last);
}

template <class T, class S, class R>
static void drawn(const Pass& pass, int64_t first, int64_t last) {
  if (pass.rademacher != 0)
    rounded<T, S, R, Distribution::rademacher>(pass, first, last);
  else
    rounded<T, S, R, Distribution::normal>(pass, first, last);
}

struct RulesWithInstances {
  using Function = cpu::ChunkFunction;
  template <class R>
  static constexpr bool kHas = kHasInstances<R>;
  template <class T, class S, class R>
  static constexpr Function kFunction = drawn<T, S, R>;
};

cpu::ChunkFunction find_instances(int rule, DType dtype, DType state) {
  return find<RulesWithInstances>(rule, dtype, state);
}

uint64_t normal_checksum(uint64_t first, uint64_t last) {
  uint64_t sum = 0;
  const auto add = [&sum](uint64_t w, int count) {
    Lanes::f32 z0, z1;
    normal_pair<Lanes>(Lanes::iota() + uint32_t(w), z0, z1);
    const Lanes::u32 b0 = Lanes::bits(z0), b1 = Lanes::bits(z1);
    for (int l = 0; l < count; ++l) sum += b0[l] * (2 * (w + l) + 1) + b1[l] * (2 * (w + l) + 2);
  };
  uint64_t w = first;
  for (; w + Lanes::W <= last; w += Lanes::W) add(w, Lanes::W);
  if (w < last) add(w, int(last - w));
  return sum;
}

}  // namespace ZK_ISA
}  // namespace zk
