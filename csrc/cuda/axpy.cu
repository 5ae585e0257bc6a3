// The first-order pass, which most steps consist of: one kernel for each dtype, distribution and rounding.
#include "kernels.cuh"

namespace zk {
namespace cuda {
namespace {

template <class T, Distribution D>
void rounded(const Pass& pass, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (pass.stochastic != 0) return launch<T, float, gpu::Axpy, D, Rounding::stochastic>(pass, stream);
  }
  launch<T, float, gpu::Axpy, D, Rounding::nearest>(pass, stream);
}

template <class T>
void typed(const Pass& pass, cudaStream_t stream) {
  if (pass.rademacher != 0)
    rounded<T, Distribution::rademacher>(pass, stream);
  else
    rounded<T, Distribution::normal>(pass, stream);
}

}  // namespace

void launch_axpy(const Pass& pass, DType dtype, cudaStream_t stream) {
  if (dtype == DType::f32) typed<float>(pass, stream);
  if (dtype == DType::f16) typed<__half>(pass, stream);
  if (dtype == DType::bf16) typed<__nv_bfloat16>(pass, stream);
}

}  // namespace cuda
}  // namespace zk
