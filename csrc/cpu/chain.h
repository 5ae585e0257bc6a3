// Chains on the CPU: every stage's pass over a chunk while the chunk is in the core's caches, 192 kB with two states.
#pragma once
#include <vector>

#include "kernels.h"

namespace zk {
namespace cpu {

// The passes that a chain consists of. `chain` must outlive it.
class StagePasses {
 public:
  StagePasses(const Chain& chain, ChunkFunction rule, ChunkFunction perturbation);
  // All of them over chunks first .. last-1.
  void run(int64_t first, int64_t last) const;

 private:
  struct Stage {
    ChunkFunction chunks;
    Pass pass;
  };
  const Chain& chain_;
  std::vector<Stage> stages_;      // to be done
  bool forks_;                     // the last of them goes to the probes,
  std::vector<TensorRow> probes_;  // by these rows
};

}  // namespace cpu
}  // namespace zk
