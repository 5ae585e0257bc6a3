// The passes that scale a direction by the curvature h, stored as float32 or bfloat16.
#include "kernels.cuh"

namespace zk {
namespace cuda {
namespace {

template <class R>
void with_state(const Pass& pass, DType dtype, DType state, cudaStream_t stream) {
  if (state == DType::bf16)
    launch_any<__nv_bfloat16, R>(pass, dtype, stream);
  else
    launch_any<float, R>(pass, dtype, stream);
}

}  // namespace

void launch_hizoo(const Pass& pass, RuleId id, DType dtype, DType state, cudaStream_t stream) {
  if (id == RuleId::scaled_axpy) with_state<gpu::ScaledAxpy>(pass, dtype, state, stream);
  if (id == RuleId::hizoo) with_state<gpu::HiZOO<false>>(pass, dtype, state, stream);
  if (id == RuleId::hizoo_restore) with_state<gpu::HiZOO<true>>(pass, dtype, state, stream);
}

}  // namespace cuda
}  // namespace zk
