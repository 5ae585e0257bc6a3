// The first-order pass, which most steps consist of: kernels for each dtype, distribution and rounding, for one seed
// and for any number.
#include "kernels.cuh"

namespace zk {
namespace cuda {
namespace {

template <class T, class S, class R, Distribution D, Rounding Q>
void seeded(const Pass& pass, cudaStream_t stream) {
  if (one_known_seed(pass))
    launch<T, S, R, D, Q, Seeds::one>(pass, stream);
  else
    launch<T, S, R, D, Q, Seeds::any>(pass, stream);
}

template <class T, class S, class R, Distribution D>
void rounded(const Pass& pass, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (pass.stochastic != 0) return seeded<T, S, R, D, Rounding::stochastic>(pass, stream);
  }
  seeded<T, S, R, D, Rounding::nearest>(pass, stream);
}

template <class T, class S, class R>
void drawn(const Pass& pass, cudaStream_t stream) {
  if (pass.rademacher != 0)
    rounded<T, S, R, Distribution::rademacher>(pass, stream);
  else
    rounded<T, S, R, Distribution::normal>(pass, stream);
}

struct Here : InFile<File::axpy> {
  template <class T, class S, class R>
  static constexpr Function kFunction = drawn<T, S, R>;
};

}  // namespace

Launch find_axpy(int rule, DType dtype, DType state) {
  return gpu::find<Here>(rule, dtype, state);
}

}  // namespace cuda
}  // namespace zk
