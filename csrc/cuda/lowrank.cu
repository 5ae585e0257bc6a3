// The passes along directions of low rank, and the kernel that makes their factors.
#include "launch.h"
#include "lowrank.cuh"

namespace zk {
namespace cuda {
namespace {

// As blocks_per_sm.
template <class T, class S, class R, Rounding Q>
constexpr int low_rank_blocks_per_sm() {
  if (R::kSums == 0) return kSm120 && Q == Rounding::nearest ? 3 : 4;
  return R::kSums == 3 && sizeof(S) == 2 && sizeof(T) == 2 ? 2 : 3;
}

// As parts_of_chunk: passes of 16-bit weights have no time for starts.
template <class T, class S, class R>
constexpr uint32_t kLowRankParts = sizeof(T) == 2 || (R::kWritten > 0 && sizeof(S) == 2) ? 1 : 4;

template <class T, class S, class R, Rounding Q>
__global__ void __launch_bounds__(kThreads, (low_rank_blocks_per_sm<T, S, R, Q>()))
    low_rank_kernel(const __grid_constant__ Pass pass) {
  if (pass.enabled != nullptr && *pass.enabled == 0) return;
  constexpr uint32_t kParts = kLowRankParts<T, S, R>;
  const ChunkRow row = pass.chunks[blockIdx.x / kParts];
  const uint32_t part = blockIdx.x % kParts;
  const TensorRow& t = pass.tensors[row.tensor];
  const Factors& of = pass.factors;
  const int64_t base = int64_t(row.number) * kChunk;
  const Blocks blocks(span_of(t, row), base, t.aligned != 0);
  const gpu::AnyUniform<R> any = gpu::any_uniform<R>(pass, t);
  const gpu::Places<T, S> p = gpu::places<T, S, R>(t, base);
  __shared__ gpu::MatrixChunk chunk;
  if (threadIdx.x == 0) chunk.find(of.rows[row.tensor], base);
  __syncthreads();
  const auto at = [&](uint32_t b) {
    return gpu::Uniform<R, gpu::Decay, gpu::FactorSeeds, gpu::SeedKeys>{
        pass,
        any.id,
        any.rule,
        any.decay,
        {{chunk, 8 * b}, of.values, any.seeds.coefs, of.of_seed, pass.num_seeds, of.rank},
        any.rounding_keys,
        any.state_keys};
  };
  using L = gpu::FactorLanes;
  constexpr auto D = Distribution::low_rank;
  blocks.each_whole(part, kParts, [&](uint32_t b) {
    gpu::rule_tile<L, T, S, R, D, Q, false>(at(b), p, 8 * size_t(b), uint64_t(base), b, 0, 8);
  });
  blocks.each_other(part, kParts, [&](uint32_t b, int lo, int hi) {
    gpu::rule_tile<L, T, S, R, D, Q, true>(at(b), p, 8 * size_t(b), uint64_t(base), b, lo, hi);
  });
}

template <class T, class S, class R, Rounding Q>
void launch_one(const Pass& pass, cudaStream_t stream) {
  const unsigned blocks = unsigned(pass.num_chunks) * kLowRankParts<T, S, R>;
  low_rank_kernel<T, S, R, Q><<<blocks, kThreads, 0, stream>>>(pass);
}

// Most steps consist of the rule without sums, which has a kernel for each rounding.
template <class T, class S, class R>
void launch_low_rank(const Pass& pass, cudaStream_t stream) {
  if constexpr (R::kSums > 0) {
    launch_one<T, S, R, Rounding::any>(pass, stream);
  } else {
    if constexpr (sizeof(T) == 2) {
      if (pass.stochastic != 0) return launch_one<T, S, R, Rounding::stochastic>(pass, stream);
    }
    launch_one<T, S, R, Rounding::nearest>(pass, stream);
  }
}

struct Every {
  using Function = Launch;
  template <class R>
  static constexpr bool kHas = true;
  template <class T, class S, class R>
  static constexpr Function kFunction = launch_low_rank<T, S, R>;
};

// A thread block takes a chunk of U or V of one seed.
__global__ void __launch_bounds__(kThreads) fill_kernel(const __grid_constant__ FactorFill fill) {
  const uint32_t chunks = uint32_t(fill.num_chunks), k = blockIdx.x / chunks;
  const ChunkRow row = fill.chunks[blockIdx.x - k * chunks];
  const FactorSide side = fill.sides[row.tensor];
  const int64_t base = int64_t(row.number) * kChunk;
  const uint32_t count = uint32_t(side.numel - base < kChunk ? side.numel - base : kChunk);
  const uint32_t* words =
      fill.seeds != nullptr ? reinterpret_cast<const uint32_t*>(fill.seeds + k) : fill.first_keys.k[0];
  const gpu::SeedKeys keys{words[0], words[1]};
  float* out = fill.values + k * fill.of_seed + side.place + base;
#pragma unroll 1
  for (uint32_t x = 8 * threadIdx.x; x < count; x += 8 * kThreads) {
    float eight[8];
    gpu::factor_tile<Lanes>(eight, side, fill.scale, uint64_t(base), x / 8, keys);
    Lanes::Out<float> tile;
    Lanes::round(tile, eight);
    if (x + 8 <= count)
      Lanes::store(out + x, tile);
    else
      Lanes::store_part(out + x, tile, 0, int(count - x));
  }
}

}  // namespace

Launch find_low_rank(int rule, DType dtype, DType state) {
  return gpu::find<Every>(rule, dtype, state);
}

void launch_fill(const FactorFill& fill, cudaStream_t stream) {
  fill_kernel<<<unsigned(fill.num_chunks * fill.num_seeds), kThreads, 0, stream>>>(fill);
}

}  // namespace cuda
}  // namespace zk
