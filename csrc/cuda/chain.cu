// Chains on the GPU: a thread block takes a chunk, as in kernels.cuh, and keeps the numbers of all stages in shared
// memory.
#include "staged.cuh"

namespace zk {
namespace cuda {
namespace {

struct Staged {
  StagedStage stages[kMaxStages];
  StagedSeed seeds[kMaxChainSeeds];
};

struct StagedDirections {
  static constexpr bool kOne = false;
  const StagedSeed* first;
  int32_t num_seeds;
  template <class F>
  ZK_FN void each(const F& f) const {
    const StagedSeed* s = first;
#pragma unroll 1
    for (int k = num_seeds; k > 0; --k, ++s) f(gpu::HostKeys{s->keys}, [&](int c) { return s->coef[c]; });
  }
};

struct StagedStages {
  const Staged& staged;
  uint32_t id;
  template <class R>
  using Uniform = gpu::Uniform<R, gpu::Decay, StagedDirections, gpu::HostKeys, gpu::StageKind>;
  template <class R>
  ZK_FN Uniform<R> uniform(int i, const gpu::StageKind& kind) const {
    static_assert(R::kScalars <= kMaxScalars);
    const StagedStage& s = staged.stages[i];
    return {kind,         id,       R(s.scalars), {s.scalars[0]}, {staged.seeds + s.first_seed, s.num_seeds},
            {s.rounding}, {s.state}};
  }
};

// Thread i makes stage i's numbers ready, then thread k direction k's, counted over all stages.
template <class R>
ZK_FN void make_ready(Staged& staged, const Chain& chain, int64_t group) {
  static_assert(kMaxStages <= kThreads && kMaxChainSeeds <= kThreads);
  const int thread = int(threadIdx.x);
  using P = gpu::Perturbation<R>;
  if (thread < chain.num_stages) make_stage_ready<R>(staged.stages[thread], chain, thread, group);
  int stage = 0, k = thread;
  while (stage < chain.num_stages && k >= chain.stages[stage].num_seeds) k -= chain.stages[stage++].num_seeds;
  if (stage < chain.num_stages) {
    const Stage& s = chain.stages[stage];
    StagedSeed& out = staged.seeds[thread];
    const uint32_t* words = reinterpret_cast<const uint32_t*>(s.seeds + k);
    stage_keys(out.keys, words[0], words[1]);
    const int coefs = s.perturbs != 0 ? gpu::kCoefs<P> : gpu::kCoefs<R>;
    for (int c = 0; c < coefs; ++c) out.coef[c] = s.coefs[(group * coefs + c) * s.num_seeds + k];
  }
  __syncthreads();
}

// As blocks_per_sm, with every stage's numbers to keep.
template <class S, class R>
constexpr int chain_blocks_per_sm() {
  const bool more = R::kStates == 2 || sizeof(S) == 2 || (kSm80 && R::kStates == 1 && R::kSums == 2);
  return more ? 2 : 3;
}

template <class T, class S, class R>
__global__ void __launch_bounds__(kThreads, (chain_blocks_per_sm<S, R>()))
    chain_kernel(const __grid_constant__ Chain chain) {
  __shared__ Staged staged;
  const bool enabled = chain.enabled == nullptr || *chain.enabled != 0;
  const ChunkRow chunk = chain.chunks[blockIdx.x];
  const TensorRow& t = chain.tensors[chunk.tensor];
  if (!enabled && (chain.fork == 0 || t.probe == 0)) return;
  make_ready<R>(staged, chain, t.group);
  const Span span = span_of(t, chunk);
  const int64_t base = int64_t(chunk.number) * kChunk;
  const gpu::Places<T, S> p = gpu::places<T, S, R>(t, base);
  T* probe = t.probe != 0 ? reinterpret_cast<T*>(t.probe + (base - t.offset) * int64_t(sizeof(T))) : nullptr;
  const StagedStages stages{staged, uint32_t(t.id)};
  const uint32_t begin = uint32_t(span.begin - base), end = uint32_t(span.end - base);
  const uint32_t touched = begin / 8, touched_end = (end + 7) / 8;
  const uint32_t whole = t.aligned ? (begin + 7) / 8 : touched_end;
  const uint32_t whole_end = t.aligned ? end / 8 : touched_end;
#pragma unroll 1
  for (uint32_t b = whole + threadIdx.x; b < whole_end; b += kThreads)
    gpu::chain_tile<gpu::Whole<T, S, R>, T, S, R, false>(chain, enabled, stages, p, probe, 8 * size_t(b),
                                                         uint64_t(base), b, 0, 8);
  if (touched == whole && touched_end == whole_end) return;
#pragma unroll 1
  for (uint32_t b = touched + threadIdx.x; b < touched_end; b += kThreads) {
    if (b >= whole && b < whole_end) continue;
    const int lo = begin > 8 * b ? int(begin - 8 * b) : 0, hi = end < 8 * b + 8 ? int(end - 8 * b) : 8;
    gpu::chain_tile<Lanes, T, S, R, true>(chain, enabled, stages, p, probe, 8 * size_t(b), uint64_t(base), b, lo, hi);
  }
}

template <class T, class S, class R>
void launch_stages(const Chain& chain, cudaStream_t stream) {
  chain_kernel<T, S, R><<<unsigned(chain.num_chunks), kThreads, 0, stream>>>(chain);
}

struct Chains {
  using Function = ChainLaunch;
  template <class R>
  static constexpr bool kHas = kHasChain<R>;
  template <class T, class S, class R>
  static constexpr Function kFunction = launch_stages<T, S, R>;
};

}  // namespace

ChainLaunch find_chain(int rule, DType dtype, DType state) {
  return gpu::find<Chains>(rule, dtype, state);
}

}  // namespace cuda
}  // namespace zk
