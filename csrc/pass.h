// One pass over a table of tensors, as plain numbers: what bindings.cpp receives and every traversal reads.
//
//   dst, states <- round(rule(src, states, sums of coef[g][c][k] z(seed_k)))     all in float32, one rounding to the
//                                                                                storage type; rules are in rules.h
//
// The table is built by zokern/passes/table.py and is the same memory layout for the CPU, CUDA and Triton backends.
#pragma once
#include <cstdint>

namespace zk {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };
// `any`: a kernel that looks at the pass at run time, where a kernel for each would be many; normals or signs.
enum class Distribution : int { normal = 0, rademacher = 1, any = 2, low_rank = 3 };
enum class Rounding : int { nearest = 0, stochastic = 1, any = 2 };

// A chunk is this many consecutive global indices, so c1 (the high word of the block index) is uniform in it.
constexpr int64_t kChunk = 1 << 14;

// A shard of a matrix along its last dimension has one for each of its rows, whose global indices are not consecutive.
struct TensorRow {  // ten int64, one row per tensor
  int64_t numel;
  int64_t offset;   // global index of the first element: not 0 for a shard
  int64_t id;       // the 32-bit tensor id
  int64_t group;    // row of scalars and coefs
  int64_t aligned;  // global indices divisible by 8 sit on 16-byte boundaries, in src, in dst and in the states
  int64_t src;      // addresses; equal for an in-place pass
  int64_t dst;
  int64_t state[2];  // addresses of what the rule keeps for each element, as many as it has
  int64_t probe;     // where a forked chain's last stage goes; 0 for none
};

struct ChunkRow {  // two int32, one row per chunk
  int32_t tensor;
  int32_t number;  // the chunk covers global indices [number*kChunk, (number+1)*kChunk)
};

// Of a tensor whose direction is of low rank: a stack of matrices, z = sum_k U[k, i] V[k, j]; docs/noise.md.
struct FactorRow {  // five int64, one row beside each TensorRow
  int64_t columns;  // of a matrix; the whole, unsharded one's, as all that is here
  int64_t rows;     // of a matrix
  int64_t matrices;
  int64_t left;   // where U [rank, matrices * rows] lies among the numbers of a seed
  int64_t right;  // and V [rank, matrices * columns]; both at a multiple of 8
};

// The factors of a pass, or of a chain's stage, in memory: small, and read where other passes draw.
struct Factors {
  const FactorRow* rows;  // null where the directions' elements are independent
  const float* values;    // [seeds][of_seed], and kFactorSlack more that vectors may read
  int64_t of_seed;        // a multiple of 8
  int32_t rank;
};
constexpr int kFactorSlack = 64;

// Philox' key words of all ten rounds. Computed on the host where a seed is known there: as launch parameters they cost
// a GPU no instruction and no register, while ten rounds of key bumps are a tenth of a block's instructions.
struct alignas(8) KeySchedule {
  uint32_t k[10][2];  // k[0] is the seed itself, low word first
};

inline KeySchedule key_schedule(int64_t seed) {
  KeySchedule s;
  uint32_t k0 = uint32_t(uint64_t(seed)), k1 = uint32_t(uint64_t(seed) >> 32);
  for (auto& words : s.k) {
    words[0] = k0;
    words[1] = k1;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return s;
}

// How factors are made: U and V of each tensor are sides, in chunks of kChunk numbers as tensors are.
struct FactorSide {  // four int64
  int64_t numel;
  int64_t id;     // the tensor's
  int64_t right;  // 0 for U, 1 for V
  int64_t place;  // among the numbers of a seed
};
struct FactorFill {
  const FactorSide* sides;
  const ChunkRow* chunks;
  int64_t num_chunks;
  const int64_t* seeds;    // [num_seeds], or null where there is one and it is known in first_keys
  KeySchedule first_keys;  // where seeds is null
  float* values;           // as Factors has them
  int64_t of_seed;
  int32_t num_seeds;
  float scale;  // of U: 1/sqrt(rank)
};

struct Pass {
  const TensorRow* tensors;
  const ChunkRow* chunks;
  int64_t num_chunks;
  const float* coefs;            // [groups][the rule's coefficients][num_seeds]
  const float* scalars;          // [groups][the rule's scalars], the first of which is the decay
  const int64_t* seeds;          // [num_seeds], or null where there is one and it is known in first_keys
  const int64_t* rounding_seed;  // [2]: of the weights and of a state; or null where they are known in the keys below
  const int32_t* enabled;        // null, or [1]: a zero there makes the pass write nothing
  KeySchedule first_keys;        // where seeds is null
  KeySchedule rounding_keys;     // where rounding_seed is null
  KeySchedule state_keys;        // where rounding_seed is null
  int32_t num_seeds;
  int32_t rademacher, stochastic;  // for kernels of Distribution::any and Rounding::any
  int32_t square_of_sum;           // curvature from (sum_k b_k z_k)^2 instead of sum_k b_k z_k^2
  int32_t keep_second;             // the second state is read but not written
  Factors factors;
};

// A chain is several passes over the same tensors, done one after another while an element is in a GPU's registers or
// in a CPU's cache: each rounds to the storage type as it would alone, so the bits are those of the passes, and memory
// moves once. A stage is the chain's rule, or `perturbs`: the perturbation that goes with it, w + A or, where the rule
// has a curvature, w + A/sqrt(h).
struct Stage {
  const int64_t* seeds;  // [num_seeds]
  const float* coefs;    // as a pass has them, of the stage's rule
  const float* scalars;
  const int64_t* rounding_seed;  // [2], or null where nothing is rounded stochastically
  const float* factors;          // of the stage's seeds, as Factors::values; not read where directions have none
  int32_t num_seeds;
  int16_t perturbs, stochastic, square_of_sum, keep_second;
};
constexpr int kMaxStages = 32, kMaxChainSeeds = 128;

struct Chain {
  const TensorRow* tensors;
  const ChunkRow* chunks;
  int64_t num_chunks;
  const int32_t* enabled;  // null, or [1]: a zero there leaves out all stages but a fork's last
  int32_t num_stages;
  int32_t rademacher;
  int32_t fork;         // the last stage, a perturbation, goes to the tensors' probes; weights are stored before it
  int32_t keep_second;  // no stage writes the second state
  Factors factors;      // of all stages, which have values of their own
  Stage stages[kMaxStages];
};

// The part of a chunk that its tensor covers, in global indices.
struct Span {
  int64_t begin, end;
};

#ifdef __CUDACC__
__host__ __device__
#endif
    inline Span span_of(const TensorRow& t, const ChunkRow& c) {
  const int64_t first = int64_t(c.number) * kChunk, last = first + kChunk;
  const int64_t stop = t.offset + t.numel;
  return {first > t.offset ? first : t.offset, last < stop ? last : stop};
}

}  // namespace zk
