// CUDA entry points: select the device, launch, describe what went wrong.
#include "../rule_info.h"
#include "launch.h"
#include "lowrank.cuh"

namespace zk {
namespace cuda {

__global__ void __launch_bounds__(kThreads)
    normal_checksum_kernel(uint64_t first, uint64_t last, unsigned long long* sum) {
  unsigned long long mine = 0;
  const uint64_t stride = uint64_t(gridDim.x) * kThreads;
  for (uint64_t w = first + uint64_t(blockIdx.x) * kThreads + threadIdx.x; w < last; w += stride) {
    float z0, z1;
    gpu::normal_pair<Lanes>(uint32_t(w), z0, z1);
    mine += __float_as_uint(z0) * (2 * w + 1) + __float_as_uint(z1) * (2 * w + 2);
  }
  atomicAdd(sum, mine);
}

namespace {

std::string describe(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return {};
  cudaGetLastError();  // or the next launch would be blamed for it
  return std::string(what) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")";
}

// Makes `device` current and puts the caller's choice back.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    status_ = cudaGetDevice(&old_);
    if (status_ == cudaSuccess && old_ != device) status_ = cudaSetDevice(device);
    changed_ = status_ == cudaSuccess && old_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(old_);
  }
  cudaError_t status() const { return status_; }

 private:
  int old_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

}  // namespace

std::string run(const Pass& pass, int rule, DType dtype, DType state, int device, void* stream) {
  Launch launch = nullptr;
  if (pass.factors.rows != nullptr) {
    launch = find_low_rank(rule, dtype, state);
  } else {
    for (const auto find : {find_axpy, find_hizoo, find_moments})
      if (launch == nullptr) launch = find(rule, dtype, state);
  }
  if (launch == nullptr) return wrong_with(rule, dtype, state);
  const OnDevice guard(device);
  if (guard.status() != cudaSuccess) return describe(guard.status(), "selecting the device");
  launch(pass, static_cast<cudaStream_t>(stream));
  return describe(cudaGetLastError(), "launching a pass");
}

std::string run_chain(const Chain& chain, int rule, DType dtype, DType state, int device, void* stream) {
  const ChainLaunch launch = (chain.factors.rows != nullptr ? find_low_rank_chain : find_chain)(rule, dtype, state);
  if (launch == nullptr) {
    const std::string wrong = wrong_with(rule, dtype, state);
    return wrong.empty()
               ? std::string("rule ") + rules()[size_t(rule)].name + " has no chain; run its passes one by one"
               : wrong;
  }
  const OnDevice guard(device);
  if (guard.status() != cudaSuccess) return describe(guard.status(), "selecting the device");
  launch(chain, static_cast<cudaStream_t>(stream));
  return describe(cudaGetLastError(), "launching a chain of passes");
}

std::string fill_factors(const FactorFill& fill, int device, void* stream) {
  constexpr int64_t kMost = 0x7fffffff;  // thread blocks of a launch
  if (fill.num_chunks == 0 || fill.num_seeds == 0) return {};
  if (fill.num_chunks > kMost / fill.num_seeds)
    return std::to_string(fill.num_seeds) + " directions with " + std::to_string(fill.num_chunks) +
           " chunks of factors each are more than a launch can make; make the factors of fewer directions at once";
  const OnDevice guard(device);
  if (guard.status() != cudaSuccess) return describe(guard.status(), "selecting the device");
  launch_fill(fill, static_cast<cudaStream_t>(stream));
  return describe(cudaGetLastError(), "launching the making of factors");
}

std::string normal_checksum(uint64_t first, uint64_t last, uint64_t* sum, int device, void* stream) {
  const OnDevice guard(device);
  if (guard.status() != cudaSuccess) return describe(guard.status(), "selecting the device");
  normal_checksum_kernel<<<4096, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      first, last, reinterpret_cast<unsigned long long*>(sum));
  return describe(cudaGetLastError(), "launching normal_checksum");
}

#define ZK_STRING_OF(x) #x
#define ZK_STRING(x) ZK_STRING_OF(x)
std::string toolkit() {
  return ZK_STRING(__CUDACC_VER_MAJOR__) "." ZK_STRING(__CUDACC_VER_MINOR__);
}

std::string architectures() {
#ifdef ZK_CUDA_ARCHITECTURES
  return ZK_CUDA_ARCHITECTURES;
#else
  return "unknown";
#endif
}

}  // namespace cuda
}  // namespace zk
