// The CUDA traversal over a chunk table, as a kernel template, and its launch. One launch serves all tensors of a pass.
//
// A thread block takes a chunk of 2^14 consecutive global indices, or several share it, tile by tile in turn; a thread
// takes blocks of eight elements, in a loop over many seeds two at once. Key and counter words c1..c3 are uniform over
// a chunk, so the compiler keeps two of Philox' twenty products and the key schedule out of the loop. Whole aligned
// blocks go through 16-byte accesses; the blocks that a tensor's ends cut, and tensors off 16-byte boundaries, go
// element by element. Arithmetic is in rules.h and noise.h.
#pragma once
#include <type_traits>

#define ZK_ISA gpu
#include "../tile.h"
#include "packed.cuh"
// After Half and BFloat, which it names.
#include "../dispatch.h"

namespace zk {
namespace cuda {

using gpu::kThreads;
using gpu::Lanes;

// Which directions a kernel is for: one whose seed the host knew, which leaves registers and branches for little else
// than the arithmetic, or any.
enum class Seeds { one = 0, any = 1 };

// Code for sm_80 and sm_120 needs more registers than the others' now and then; packed pairs must lie in an even
// register and the next.
#ifdef __CUDA_ARCH__
constexpr bool kSm80 = __CUDA_ARCH__ < 900, kPacked = gpu::kPackedPairs, kSm120 = __CUDA_ARCH__ >= 1200;
#else
constexpr bool kSm80 = false, kPacked = false, kSm120 = false;
#endif

// Thread blocks that a multiprocessor holds: 6 leave 40 registers to a thread, 5 leave 48, 4 leave 64, 3 leave 80. As
// many as leave nothing to spill, on any architecture; machine_code.py counts.
template <class T, class S, class R, Rounding Q, Seeds K>
constexpr int blocks_per_sm() {
  const bool state_rounded = R::kWritten > 0 && sizeof(S) == 2;
  if (K == Seeds::any) {
    const bool more = Q == Rounding::stochastic || (state_rounded && R::kSums == 3);
    return more || (kPacked && R::kSums == 0 && sizeof(T) == 4) ? 3 : 4;
  }
  if (R::kSums == 0) return kPacked && Q == Rounding::stochastic ? 5 : 6;
  const bool half_stochastic = Q == Rounding::stochastic && std::is_same_v<T, __half>;
  if (half_stochastic && (state_rounded || (kSm120 && R::kWritten == 1))) return 3;
  const bool stochastic = Q == Rounding::stochastic || state_rounded;
  const int fewer = kSm120 && R::kSums == 1 && R::kWritten == 0;
  if (stochastic) return R::kWritten > 0 ? 4 : 5 - fewer;
  if (R::kWritten == 2) return kPacked && sizeof(T) == 2 ? 3 : 4;
  return 6 - fewer;
}

// How many thread blocks share a chunk. With one to a chunk, those that run at once are in as many distant places, and
// float32 passes, whose accesses fill half a sector each, reach 78 to 97 % of a copy on an H200. With eight, each has
// one tile, and its start to pay: float32 passes, which have the time, then reach 93 to 101 %, and take 19 % less where
// there is least arithmetic, for signs. Passes of 16-bit weights have no time to spare, or took 4 % less alone and 9 %
// more in a step of OPT-13B (benchmarks/results/tried); those that round a state stochastically took 7 to 11 % more.
template <class T, class S, class R, Distribution D, Seeds K>
constexpr uint32_t parts_of_chunk() {
  if (K == Seeds::any || sizeof(T) == 2 || (R::kWritten > 0 && sizeof(S) == 2)) return 1;
  return D == Distribution::rademacher || (R::kStates > 0 && sizeof(S) == 4) ? 8 : 4;
}
template <class T, class S, class R, Distribution D, Seeds K>
constexpr uint32_t kPartsOfChunk = parts_of_chunk<T, S, R, D, K>();

// The purpose whose head a kernel makes before its loop, where ptxas would make it anew for each tile to save
// registers.
template <Distribution D>
constexpr gpu::Purpose kDrawn = D == Distribution::rademacher ? gpu::kRademacher : gpu::kNormal;

// What a kernel for one seed asks the pass: HELENE writes its curvature now and then only.
struct Plain {
  static constexpr int32_t rademacher = 0, stochastic = 0, square_of_sum = 0;
  int32_t keep_second;
};

// The first seeds' keys and coefficients, in shared memory: made in the loop over seeds, a key word would take a slot
// of every warp for every tile.
constexpr int kStaged = 128;
struct alignas(16) StagedSeed {
  KeySchedule keys;
  gpu::Head head;
  float coef[4];
};
template <Distribution D>
struct StagedSeeds {
  static constexpr bool kOne = false;
  const StagedSeed* staged;
  const Pass& pass;
  const float* coefs;
  template <class F>
  ZK_FN void each(const F& f) const {
    const int num_seeds = pass.num_seeds;
    const StagedSeed* s = staged;
#pragma unroll 1
    for (int k = min(num_seeds, kStaged); k > 0; --k, ++s)  // an end to compare with would be computed each time
      f(gpu::ChunkKeys<kDrawn<D>>{{s->keys}, s->head}, [&](int c) { return s->coef[c]; });
#pragma unroll 1
    for (int k = kStaged; k < num_seeds; ++k) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(pass.seeds + k);
      f(gpu::SeedKeys{words[0], words[1]}, [&](int c) { return coefs[c * num_seeds + k]; });
    }
  }
};
// The loop beyond the staged seeds reads pass.seeds itself. all.seeds may be the pass's own parameters too, and
// nvcc before 13.1 takes a pointer that may be either for one into shared memory once it stands beside `staged`.
template <class R, Distribution D>
ZK_FN StagedSeeds<D> stage(StagedSeed* staged, const Pass& pass, gpu::ManySeeds all, uint64_t base, uint32_t id) {
  const int k = int(threadIdx.x);
  static_assert(kStaged <= kThreads && gpu::kCoefs<R> <= 4);
  if (k < min(all.num_seeds, kStaged)) {
    const gpu::SeedKeys keys{all.seeds[2 * k], all.seeds[2 * k + 1]};
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      staged[k].keys.k[round][0] = keys.k0(round);
      staged[k].keys.k[round][1] = keys.k1(round);
    }
    staged[k].head = gpu::chunk_head<kDrawn<D>>(base, id, keys);
#pragma unroll
    for (int c = 0; c < gpu::kCoefs<R>; ++c) staged[k].coef[c] = all.coefs[c * all.num_seeds + k];
  }
  __syncthreads();
  return {staged, pass, all.coefs};
}

template <class T, class S, class R, Distribution D, Rounding Q, Seeds K>
__global__ void __launch_bounds__(kThreads, (blocks_per_sm<T, S, R, Q, K>()))
    rule_kernel(const __grid_constant__ Pass pass) {
  if (pass.enabled != nullptr && *pass.enabled == 0) return;
  constexpr uint32_t kParts = kPartsOfChunk<T, S, R, D, K>;
  const ChunkRow chunk = pass.chunks[blockIdx.x / kParts];
  const uint32_t part = blockIdx.x % kParts;
  const TensorRow& t = pass.tensors[chunk.tensor];
  const Span span = span_of(t, chunk);
  const gpu::AnyUniform<R> any = gpu::any_uniform<R>(pass, t);

  // Counted from the chunk's first index, a multiple of 8, in 32 bits, and in blocks of eight elements.
  const int64_t base = int64_t(chunk.number) * kChunk;
  const gpu::Places<T, S> p = gpu::places<T, S, R>(t, base);
  const uint32_t begin = uint32_t(span.begin - base), end = uint32_t(span.end - base);
  const uint32_t touched = begin / 8, touched_end = (end + 7) / 8;
  const uint32_t whole = t.aligned ? (begin + 7) / 8 : touched_end;
  uint32_t whole_end = t.aligned ? end / 8 : touched_end;

  using Whole = std::conditional_t<D == Distribution::rademacher, Lanes, gpu::Whole<T, S, R>>;
  const auto go_through_whole = [&](auto lanes, const auto& u) {
    using L = decltype(lanes);
#pragma unroll 1
    for (uint32_t b = whole + part * L::kWidth * kThreads + threadIdx.x; b < whole_end;
         b += L::kWidth * kThreads * kParts) {
      // Addresses from b anew: two instructions, where pointers carried along take seven.
      if constexpr (K == Seeds::one && !kSm120) asm("" : "+r"(b));
      gpu::rule_tile<L, T, S, R, D, Q, false>(u, p, 8 * size_t(b), uint64_t(base), b, 0, 8);
    }
  };
  const auto go_through_rest = [&](const auto& u) {
    if (touched == whole && touched_end == whole_end) return;
#pragma unroll 1
    for (uint32_t b = touched + part * kThreads + threadIdx.x; b < touched_end; b += kThreads * kParts) {
      if (b >= whole && b < whole_end) continue;
      const int lo = begin > 8 * b ? int(begin - 8 * b) : 0, hi = end < 8 * b + 8 ? int(end - 8 * b) : 8;
      gpu::rule_tile<Lanes, T, S, R, D, Q, true>(u, p, 8 * size_t(b), uint64_t(base), b, lo, hi);
    }
  };

  if constexpr (K == Seeds::one) {
    using gpu::HostKeys;
    using One = gpu::OneSeed<R, gpu::ChunkKeys<kDrawn<D>>>;
    const Plain plain{pass.keep_second};
    const HostKeys first{pass.first_keys};
    const One one({first, gpu::chunk_head<kDrawn<D>>(uint64_t(base), any.id, first)}, any.seeds.coefs);
    const HostKeys keys{pass.rounding_keys}, state_keys{pass.state_keys};
    const gpu::Uniform<R, gpu::Decay, One, HostKeys, Plain> u{plain, any.id, any.rule,  any.decay,
                                                              one,   keys,   state_keys};
    const gpu::Uniform<R, gpu::NoDecay, One, HostKeys, Plain> no_decay{plain, any.id, any.rule,  {},
                                                                       one,   keys,   state_keys};
    if (any.decay.factor == 1.f)
      go_through_whole(Whole(), no_decay);
    else
      go_through_whole(Whole(), u);
    go_through_rest(u);
  } else {
    __shared__ StagedSeed staged[kStaged];
    const StagedSeeds<D> seeds = stage<R, D>(staged, pass, any.seeds, uint64_t(base), any.id);
    const gpu::Uniform<R, gpu::Decay, StagedSeeds<D>, gpu::SeedKeys> u{
        pass, any.id, any.rule, any.decay, seeds, any.rounding_keys, any.state_keys};
    if constexpr (R::kSums == 0 && D == Distribution::normal) {
      if (whole < whole_end)
        whole_end -= (whole_end - whole) % (2 * kThreads);  // whole pairs; others are with the rest
      go_through_whole(gpu::PairOf<Whole>(), u);
    } else {
      go_through_whole(Whole(), u);
    }
    go_through_rest(any);
  }
}

template <class T, class S, class R, Distribution D, Rounding Q, Seeds K>
void launch(const Pass& pass, cudaStream_t stream) {
  const unsigned blocks = unsigned(pass.num_chunks) * kPartsOfChunk<T, S, R, D, K>;
  rule_kernel<T, S, R, D, Q, K><<<blocks, kThreads, 0, stream>>>(pass);
}

inline bool one_known_seed(const Pass& pass) {
  return pass.num_seeds == 1 && pass.seeds == nullptr && pass.rounding_seed == nullptr;
}

// Of each dtype a kernel for the common kind of pass, for each rounding, and one that looks up what it is to do.
template <class T, class S, class R>
void launch_typed(const Pass& pass, cudaStream_t stream) {
  constexpr auto D = Distribution::normal;
  if (!one_known_seed(pass) || pass.rademacher != 0 || pass.square_of_sum != 0)
    return launch<T, S, R, Distribution::any, Rounding::any, Seeds::any>(pass, stream);
  if constexpr (sizeof(T) == 2) {
    if (pass.stochastic != 0) return launch<T, S, R, D, Rounding::stochastic, Seeds::one>(pass, stream);
  }
  launch<T, S, R, D, Rounding::nearest, Seeds::one>(pass, stream);
}

// The file that a rule's kernels are compiled in, because they take long to compile: the rule without sums, which has
// kernels for each distribution, those whose states may be 16-bit, and the others.
enum class File { axpy, hizoo, moments };
template <class R>
constexpr File kFile = R::kSums == 0   ? File::axpy
                       : R::kHalfState ? File::hizoo
                                       : File::moments;
using Launch = void (*)(const Pass&, cudaStream_t);
template <File kThis>
struct InFile {
  using Function = Launch;
  template <class R>
  static constexpr bool kHas = kFile<R> == kThis;
  template <class T, class S, class R>
  static constexpr Function kFunction = launch_typed<T, S, R>;
};

// What launches a pass of a rule by its number, out of a file's share; null where that has none.
Launch find_axpy(int rule, DType, DType state);
Launch find_hizoo(int rule, DType, DType state);
Launch find_moments(int rule, DType, DType state);
// And a chain.
using ChainLaunch = void (*)(const Chain&, cudaStream_t);
ChainLaunch find_chain(int rule, DType, DType state);

}  // namespace cuda
}  // namespace zk
