// The CUDA traversal over a chunk table, and its launches. One launch serves all tensors of a pass.
//
// A thread block takes one chunk of 2^14 consecutive global indices; a thread takes blocks of eight elements. Key and
// counter words c1..c3 are uniform over a chunk, so the compiler keeps two of Philox' twenty products and the first
// direction's key schedule out of the loop. Whole aligned blocks go through 16-byte accesses; the blocks that a
// tensor's ends cut, and tensors off 16-byte boundaries, go element by element. Arithmetic is in rules.h and noise.h.
#define ZK_ISA gpu
#include "../tile.h"
#include "lanes.cuh"
#include "launch.h"

namespace zk {
namespace cuda {

using gpu::Lanes;
constexpr int kThreads = 256, kBlocksPerSM = 6;  // 1536 threads on a multiprocessor: at most 40 registers each

template <class T, Distribution D, Rounding R>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM) add_noise_kernel(const __grid_constant__ Pass pass) {
  if (pass.enabled != nullptr && *pass.enabled == 0) return;
  const ChunkRow chunk = pass.chunks[blockIdx.x];
  const TensorRow& t = pass.tensors[chunk.tensor];
  const Span span = span_of(t, chunk);
  const gpu::AnyUniform any = gpu::any_uniform(pass, t);

  // Counted from the chunk's first index, a multiple of 8, in 32 bits, and in blocks of eight elements.
  const int64_t base = int64_t(chunk.number) * kChunk;
  const T* src = reinterpret_cast<const T*>(t.src + (base - t.offset) * int64_t(sizeof(T)));
  T* dst = reinterpret_cast<T*>(t.dst + (base - t.offset) * int64_t(sizeof(T)));
  const uint32_t begin = uint32_t(span.begin - base), end = uint32_t(span.end - base);
  const uint32_t touched = begin / 8, touched_end = (end + 7) / 8;
  const uint32_t whole = t.aligned ? (begin + 7) / 8 : touched_end, whole_end = t.aligned ? end / 8 : touched_end;

  gpu::with_uniform(pass, any, [&](const auto& u) {
#pragma unroll 1
    for (uint32_t b = whole + threadIdx.x; b < whole_end; b += kThreads)
      gpu::axpy_tile<Lanes, T, D, R, false>(u, src + 8 * size_t(b), dst + 8 * size_t(b), uint64_t(base), b, 0, 8);
  });

  if (touched == whole && touched_end == whole_end) return;
#pragma unroll 1
  for (uint32_t b = touched + threadIdx.x; b < touched_end; b += kThreads) {
    if (b >= whole && b < whole_end) continue;
    const int lo = begin > 8 * b ? int(begin - 8 * b) : 0, hi = end < 8 * b + 8 ? int(end - 8 * b) : 8;
    gpu::axpy_tile<Lanes, T, D, R, true>(any, src + 8 * size_t(b), dst + 8 * size_t(b), uint64_t(base), b, lo, hi);
  }
}

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

// ------------------------------------------------------------------------------------------------------------ launches

namespace {

std::string describe(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return {};
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

template <class T, Distribution D>
void launch(const Pass& pass, Rounding r, cudaStream_t stream) {
  const dim3 grid(unsigned(pass.num_chunks));
  if constexpr (sizeof(T) == 2) {
    if (r == Rounding::stochastic) {
      add_noise_kernel<T, D, Rounding::stochastic><<<grid, kThreads, 0, stream>>>(pass);
      return;
    }
  }
  add_noise_kernel<T, D, Rounding::nearest><<<grid, kThreads, 0, stream>>>(pass);
}

template <class T>
void launch(const Pass& pass, Distribution d, Rounding r, cudaStream_t stream) {
  if (d == Distribution::normal)
    launch<T, Distribution::normal>(pass, r, stream);
  else
    launch<T, Distribution::rademacher>(pass, r, stream);
}

}  // namespace

std::string add_noise(const Pass& pass, DType dtype, Distribution d, Rounding r, int device, void* stream) {
  const OnDevice guard(device);
  if (guard.status() != cudaSuccess) return describe(guard.status(), "selecting the device");
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (dtype == DType::f32) launch<float>(pass, d, r, s);
  if (dtype == DType::f16) launch<__half>(pass, d, r, s);
  if (dtype == DType::bf16) launch<__nv_bfloat16>(pass, d, r, s);
  return describe(cudaGetLastError(), "launching add_noise");
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
