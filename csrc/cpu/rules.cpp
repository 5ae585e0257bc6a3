// The passes of all other rules on the CPU: one instance for each dtype, which looks up distribution and rounding.
#include "traverse.h"

namespace zk {
namespace ZK_ISA {

template <class S, class R>
static void typed(const Pass& pass, DType dtype, int64_t first, int64_t last) {
  constexpr auto D = Distribution::any;
  constexpr auto Q = Rounding::any;
  if (dtype == DType::f32) rule_chunks<float, S, R, D, Q>(pass, first, last);
  if (dtype == DType::f16) rule_chunks<Half, S, R, D, Q>(pass, first, last);
  if (dtype == DType::bf16) rule_chunks<BFloat, S, R, D, Q>(pass, first, last);
}

template <class R>
static void with_state(const Pass& pass, DType dtype, DType state, int64_t first, int64_t last) {
  if (state == DType::bf16)
    typed<BFloat, R>(pass, dtype, first, last);
  else
    typed<float, R>(pass, dtype, first, last);
}

static void rule(const Pass& pass, RuleId id, DType dtype, DType state, int64_t first, int64_t last) {
  if (id == RuleId::scaled_axpy) with_state<ScaledAxpy>(pass, dtype, state, first, last);
  if (id == RuleId::hizoo) with_state<HiZOO<false>>(pass, dtype, state, first, last);
  if (id == RuleId::hizoo_restore) with_state<HiZOO<true>>(pass, dtype, state, first, last);
  if (id == RuleId::helene) typed<float, Helene>(pass, dtype, first, last);
  if (id == RuleId::momentum) typed<float, Momentum>(pass, dtype, first, last);
  if (id == RuleId::adam) typed<float, Adam>(pass, dtype, first, last);
  if (id == RuleId::adamezo) typed<float, AdaMeZO>(pass, dtype, first, last);
  if (id == RuleId::sign) typed<float, Sign>(pass, dtype, first, last);
}

}  // namespace ZK_ISA

namespace cpu {
const Kernels ZK_KERNELS = {ZK_ISA::axpy, ZK_ISA::rule, ZK_ISA::normal_checksum};
}
}  // namespace zk
