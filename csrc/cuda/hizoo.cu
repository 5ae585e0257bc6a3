// The passes whose states are stored as float32 or bfloat16: those that scale a direction by the curvature h.
#include "kernels.cuh"

namespace zk {
namespace cuda {

Launch find_hizoo(int rule, DType dtype, DType state) {
  return gpu::find<InFile<File::hizoo>>(rule, dtype, state);
}

}  // namespace cuda
}  // namespace zk
