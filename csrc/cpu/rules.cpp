// The passes of all other rules on the CPU: one instance for each dtype, which looks up distribution and rounding.
#include "traverse.h"

namespace zk {
namespace ZK_ISA {

struct OtherRules {
  using Function = cpu::ChunkFunction;
  template <class R>
  static constexpr bool kHas = !kHasInstances<R>;
  template <class T, class S, class R>
  static constexpr Function kFunction = rule_chunks<T, S, R, Distribution::any, Rounding::any>;
};

static cpu::ChunkFunction find_any(int rule, DType dtype, DType state) {
  const cpu::ChunkFunction found = find_instances(rule, dtype, state);
  return found != nullptr ? found : find<OtherRules>(rule, dtype, state);
}

}  // namespace ZK_ISA

namespace cpu {
const Kernels ZK_KERNELS = {ZK_ISA::find_any, ZK_ISA::normal_checksum};
}
}  // namespace zk
