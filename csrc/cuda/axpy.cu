// The first-order pass, which most steps consist of: kernels for each dtype, distribution and rounding, for one seed
// and for any number.
#include "kernels.cuh"

namespace zk {
namespace cuda {
namespace {

template <class T, Distribution D, Rounding Q>
void seeded(const Pass& pass, cudaStream_t stream) {
  if (one_known_seed(pass))
    launch<T, float, gpu::Axpy, D, Q, Seeds::one>(pass, stream);
  else
    launch<T, float, gpu::Axpy, D, Q, Seeds::any>(pass, stream);
}

template <class T, Distribution D>
void rounded(const Pass& pass, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (pass.stochastic != 0) return seeded<T, D, Rounding::stochastic>(pass, stream);
  }
  seeded<T, D, Rounding::nearest>(pass, stream);
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
