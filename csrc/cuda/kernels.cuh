// The CUDA traversal over a chunk table, as a kernel template, and its launch. One launch serves all tensors of a pass.
//
// A thread block takes one chunk of 2^14 consecutive global indices; a thread takes blocks of eight elements. Key and
// counter words c1..c3 are uniform over a chunk, so the compiler keeps two of Philox' twenty products and the first
// direction's key schedule out of the loop. Whole aligned blocks go through 16-byte accesses; the blocks that a
// tensor's ends cut, and tensors off 16-byte boundaries, go element by element. Arithmetic is in rules.h and noise.h.
#pragma once
#define ZK_ISA gpu
#include "../tile.h"
#include "lanes.cuh"

namespace zk {
namespace cuda {

using gpu::Lanes;
constexpr int kThreads = 256;
// Thread blocks that a multiprocessor holds: 6 leave 40 registers to a thread, 5 leave 48, 4 leave 64.
template <class R>
constexpr int kBlocksPerSM = R::kStates + R::kSums >= 3 ? (R::kStates == 2 ? 4 : 5) : 6;

template <class T, class S, class R, Distribution D, Rounding Q>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<R>) rule_kernel(const __grid_constant__ Pass pass) {
  if (pass.enabled != nullptr && *pass.enabled == 0) return;
  const ChunkRow chunk = pass.chunks[blockIdx.x];
  const TensorRow& t = pass.tensors[chunk.tensor];
  const Span span = span_of(t, chunk);
  const gpu::AnyUniform<R> any = gpu::any_uniform<R>(pass, t);

  // Counted from the chunk's first index, a multiple of 8, in 32 bits, and in blocks of eight elements.
  const int64_t base = int64_t(chunk.number) * kChunk;
  const gpu::Places<T, S> p = gpu::places<T, S, R>(t, base);
  const uint32_t begin = uint32_t(span.begin - base), end = uint32_t(span.end - base);
  const uint32_t touched = begin / 8, touched_end = (end + 7) / 8;
  const uint32_t whole = t.aligned ? (begin + 7) / 8 : touched_end, whole_end = t.aligned ? end / 8 : touched_end;

  gpu::with_uniform<R>(pass, any, [&](const auto& u) {
#pragma unroll 1
    for (uint32_t b = whole + threadIdx.x; b < whole_end; b += kThreads)
      gpu::rule_tile<Lanes, T, S, R, D, Q, false>(u, p, 8 * size_t(b), uint64_t(base), b, 0, 8);
  });

  if (touched == whole && touched_end == whole_end) return;
#pragma unroll 1
  for (uint32_t b = touched + threadIdx.x; b < touched_end; b += kThreads) {
    if (b >= whole && b < whole_end) continue;
    const int lo = begin > 8 * b ? int(begin - 8 * b) : 0, hi = end < 8 * b + 8 ? int(end - 8 * b) : 8;
    gpu::rule_tile<Lanes, T, S, R, D, Q, true>(any, p, 8 * size_t(b), uint64_t(base), b, lo, hi);
  }
}

template <class T, class S, class R, Distribution D, Rounding Q>
void launch(const Pass& pass, cudaStream_t stream) {
  rule_kernel<T, S, R, D, Q><<<unsigned(pass.num_chunks), kThreads, 0, stream>>>(pass);
}

// One kernel for each dtype, which looks up distribution and rounding.
template <class S, class R>
void launch_any(const Pass& pass, DType dtype, cudaStream_t stream) {
  constexpr auto D = Distribution::any;
  constexpr auto Q = Rounding::any;
  if (dtype == DType::f32) launch<float, S, R, D, Q>(pass, stream);
  if (dtype == DType::f16) launch<__half, S, R, D, Q>(pass, stream);
  if (dtype == DType::bf16) launch<__nv_bfloat16, S, R, D, Q>(pass, stream);
}

// Each in a file of its own, because they take long to compile.
void launch_axpy(const Pass&, DType, cudaStream_t);
void launch_hizoo(const Pass&, RuleId, DType, DType state, cudaStream_t);
void launch_moments(const Pass&, RuleId, DType, cudaStream_t);

}  // namespace cuda
}  // namespace zk
