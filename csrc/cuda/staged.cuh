// What a chain's kernels keep of each stage in shared memory.
#pragma once
#include "chain.cuh"

namespace zk {
namespace cuda {

constexpr int kMaxScalars = 8;
struct alignas(16) StagedStage {
  KeySchedule rounding, state;
  float scalars[kMaxScalars];
  int32_t first_seed, num_seeds;
};

ZK_FN void stage_keys(KeySchedule& schedule, uint32_t low, uint32_t high) {
  const gpu::SeedKeys keys{low, high};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    schedule.k[round][0] = keys.k0(round);
    schedule.k[round][1] = keys.k1(round);
  }
}

template <class R>
ZK_FN void make_stage_ready(StagedStage& out, const Chain& chain, int stage, int64_t group) {
  using P = gpu::Perturbation<R>;
  const Stage& s = chain.stages[stage];
  int first = 0;
  for (int i = 0; i < stage; ++i) first += chain.stages[i].num_seeds;
  out.first_seed = first;
  out.num_seeds = s.num_seeds;
  const int scalars = s.perturbs != 0 ? P::kScalars : R::kScalars;
  for (int i = 0; i < scalars; ++i) out.scalars[i] = s.scalars[group * scalars + i];
  if (s.rounding_seed != nullptr) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(s.rounding_seed);
    stage_keys(out.rounding, words[0], words[1]);
    stage_keys(out.state, words[2], words[3]);
  }
}

// A perturbation that reads a curvature has no update of its own to stand in a chain with.
template <class R>
constexpr bool kHasChain = R::kStates == 0 || !std::is_same_v<R, gpu::Perturbation<R>>;

}  // namespace cuda
}  // namespace zk
