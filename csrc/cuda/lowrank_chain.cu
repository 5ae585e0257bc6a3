// Chains along directions of low rank: as chain.cu, but directions are read and not drawn.
#include "lowrank.cuh"
#include "staged.cuh"

namespace zk {
namespace cuda {
namespace {

struct FactorStage : StagedStage {
  const float* coefs;  // of the tensor's group
};

// A chain's numbers at one block of a chunk.
struct FactorStages {
  const FactorStage* staged;
  const Chain& chain;
  gpu::FactorPlace place;
  uint32_t id;
  template <class R>
  using Uniform = gpu::Uniform<R, gpu::Decay, gpu::FactorSeeds, gpu::HostKeys, gpu::StageKind>;
  template <class R>
  ZK_FN Uniform<R> uniform(int i, const gpu::StageKind& kind) const {
    const FactorStage& s = staged[i];
    const Factors& of = chain.factors;
    return {kind,
            id,
            R(s.scalars),
            {s.scalars[0]},
            {place, chain.stages[i].factors, s.coefs, of.of_seed, s.num_seeds, of.rank},
            {s.rounding},
            {s.state}};
  }
};

template <class R>
ZK_FN void make_ready(FactorStage& out, const Chain& chain, int stage, int64_t group) {
  using P = gpu::Perturbation<R>;
  const Stage& s = chain.stages[stage];
  make_stage_ready<R>(out, chain, stage, group);
  out.coefs = s.coefs + group * (s.perturbs != 0 ? gpu::kCoefs<P> : gpu::kCoefs<R>)*s.num_seeds;
}

// As chain_blocks_per_sm.
template <class S, class R>
constexpr int low_rank_chain_blocks_per_sm() {
  return 2;
}

template <class T, class S, class R>
__global__ void __launch_bounds__(kThreads, (low_rank_chain_blocks_per_sm<S, R>()))
    low_rank_chain_kernel(const __grid_constant__ Chain chain) {
  __shared__ FactorStage staged[kMaxStages];
  __shared__ gpu::MatrixChunk chunk;
  const bool enabled = chain.enabled == nullptr || *chain.enabled != 0;
  const ChunkRow row = chain.chunks[blockIdx.x];
  const TensorRow& t = chain.tensors[row.tensor];
  if (!enabled && (chain.fork == 0 || t.probe == 0)) return;
  if (int(threadIdx.x) < chain.num_stages) make_ready<R>(staged[threadIdx.x], chain, int(threadIdx.x), t.group);
  const int64_t base = int64_t(row.number) * kChunk;
  if (threadIdx.x == kThreads - 1) chunk.find(chain.factors.rows[row.tensor], base);  // a thread without a stage
  __syncthreads();
  const Blocks blocks(span_of(t, row), base, t.aligned != 0);
  const gpu::Places<T, S> p = gpu::places<T, S, R>(t, base);
  T* probe = t.probe != 0 ? reinterpret_cast<T*>(t.probe + (base - t.offset) * int64_t(sizeof(T))) : nullptr;
  const auto at = [&](uint32_t b) { return FactorStages{staged, chain, {chunk, 8 * b}, uint32_t(t.id)}; };
  using L = gpu::FactorLanes;
  constexpr auto D = Distribution::low_rank;
  blocks.each_whole(0, 1, [&](uint32_t b) {
    gpu::chain_tile<L, T, S, R, false, D>(chain, enabled, at(b), p, probe, 8 * size_t(b), uint64_t(base), b, 0, 8);
  });
  blocks.each_other(0, 1, [&](uint32_t b, int lo, int hi) {
    gpu::chain_tile<L, T, S, R, true, D>(chain, enabled, at(b), p, probe, 8 * size_t(b), uint64_t(base), b, lo, hi);
  });
}

template <class T, class S, class R>
void launch_stages(const Chain& chain, cudaStream_t stream) {
  low_rank_chain_kernel<T, S, R><<<unsigned(chain.num_chunks), kThreads, 0, stream>>>(chain);
}

struct Chains {
  using Function = ChainLaunch;
  template <class R>
  static constexpr bool kHas = kHasChain<R>;
  template <class T, class S, class R>
  static constexpr Function kFunction = launch_stages<T, S, R>;
};

}  // namespace

ChainLaunch find_low_rank_chain(int rule, DType dtype, DType state) {
  return gpu::find<Chains>(rule, dtype, state);
}

}  // namespace cuda
}  // namespace zk
