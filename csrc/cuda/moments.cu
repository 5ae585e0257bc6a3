// The updates with moments and the sign update.
#include "kernels.cuh"

namespace zk {
namespace cuda {

void launch_moments(const Pass& pass, RuleId id, DType dtype, cudaStream_t stream) {
  if (id == RuleId::helene) launch_any<float, gpu::Helene>(pass, dtype, stream);
  if (id == RuleId::momentum) launch_any<float, gpu::Momentum>(pass, dtype, stream);
  if (id == RuleId::adam) launch_any<float, gpu::Adam>(pass, dtype, stream);
  if (id == RuleId::adamezo) launch_any<float, gpu::AdaMeZO>(pass, dtype, stream);
  if (id == RuleId::sign) launch_any<float, gpu::Sign>(pass, dtype, stream);
}

}  // namespace cuda
}  // namespace zk
