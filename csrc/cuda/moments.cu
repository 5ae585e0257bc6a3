// The passes of all other rules: the updates with moments and the sign update.
#include "kernels.cuh"

namespace zk {
namespace cuda {

Launch find_moments(int rule, DType dtype, DType state) {
  return gpu::find<InFile<File::moments>>(rule, dtype, state);
}

}  // namespace cuda
}  // namespace zk
