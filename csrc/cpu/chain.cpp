#include "chain.h"

#include <algorithm>

namespace zk {
namespace cpu {
namespace {

Pass pass_of(const Chain& chain, const Stage& stage) {
  Pass p{};
  p.tensors = chain.tensors;
  p.chunks = chain.chunks;
  p.num_chunks = chain.num_chunks;
  p.coefs = stage.coefs;
  p.scalars = stage.scalars;
  p.num_seeds = stage.num_seeds;
  if (stage.num_seeds == 1)
    p.first_keys = key_schedule(stage.seeds[0]);
  else
    p.seeds = stage.seeds;
  if (stage.rounding_seed != nullptr) {
    p.rounding_keys = key_schedule(stage.rounding_seed[0]);
    p.state_keys = key_schedule(stage.rounding_seed[1]);
  }
  p.rademacher = chain.rademacher;
  p.stochastic = stage.stochastic;
  p.square_of_sum = stage.square_of_sum;
  p.factors = chain.factors;
  p.factors.values = stage.factors;
  p.keep_second = stage.keep_second;  // and so in every stage where the chain's is set
  return p;
}

// As the tensors' rows, but what is written goes to the probe.
std::vector<TensorRow> probe_rows(const Chain& chain) {
  int32_t count = 0;
  for (int64_t c = 0; c < chain.num_chunks; ++c) count = std::max(count, chain.chunks[c].tensor + 1);
  std::vector<TensorRow> rows(chain.tensors, chain.tensors + count);
  for (TensorRow& row : rows) row.dst = row.probe;
  return rows;
}

}  // namespace

StagePasses::StagePasses(const Chain& chain, ChunkFunction rule, ChunkFunction perturbation)
    : chain_(chain), forks_(chain.fork != 0) {
  const bool enabled = chain.enabled == nullptr || *chain.enabled != 0;
  const int first = enabled ? 0 : chain.num_stages - int(forks_);
  for (int i = first; i < chain.num_stages; ++i) {
    const zk::Stage& stage = chain.stages[i];
    stages_.push_back({stage.perturbs != 0 ? perturbation : rule, pass_of(chain, stage)});
  }
  if (forks_) {
    probes_ = probe_rows(chain);
    stages_.back().pass.tensors = probes_.data();
  }
}

void StagePasses::run(int64_t first, int64_t last) const {
  for (int64_t c = first; c < last; ++c) {
    const bool probed = !forks_ || probes_[size_t(chain_.chunks[c].tensor)].dst != 0;
    const size_t count = stages_.size() - size_t(!probed);
    for (size_t i = 0; i < count; ++i) stages_[i].chunks(stages_[i].pass, c, c + 1);
  }
}

}  // namespace cpu
}  // namespace zk
