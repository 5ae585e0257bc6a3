// The passes of all other rules on the CPU: one instance for each dtype, which looks up distribution and rounding.
#include "traverse.h"

namespace zk {
namespace ZK_ISA {

template <class T, class S, class R>
static void drawn_any(const Pass& pass, int64_t first, int64_t last) {
  if (pass.factors.rows != nullptr)
    rule_chunks<T, S, R, Distribution::low_rank, Rounding::any>(pass, first, last);
  else
    rule_chunks<T, S, R, Distribution::any, Rounding::any>(pass, first, last);
}

struct OtherRules {
  using Function = cpu::ChunkFunction;
  template <class R>
  static constexpr bool kHas = !kHasInstances<R>;
  template <class T, class S, class R>
  static constexpr Function kFunction = drawn_any<T, S, R>;
};

static cpu::ChunkFunction find_any(int rule, DType dtype, DType state) {
  const cpu::ChunkFunction found = find_instances(rule, dtype, state);
  return found != nullptr ? found : find<OtherRules>(rule, dtype, state);
}

}  // namespace ZK_ISA

namespace cpu {
const Kernels ZK_KERNELS = {ZK_ISA::find_any, ZK_ISA::normal_checksum, ZK_ISA::fill_factors};
}
}  // namespace zk
