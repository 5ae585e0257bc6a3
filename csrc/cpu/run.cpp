// Chooses the instruction set at run time and splits the chunks over threads.
//
// Threads are started for a pass and joined at its end: 20 to 30 microseconds each against milliseconds of work, and
// nothing is left behind that a fork (data loaders) could break. Small passes stay on the calling thread. Every thread
// computes with round-to-nearest and no flush-to-zero, whatever the process has set, and puts the old state back.
#include "run.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "../rule_info.h"
#include "chain.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace zk {
namespace cpu {
namespace {

class StandardFloats {
 public:
#if defined(__x86_64__)
  StandardFloats() : old_(_mm_getcsr()) { _mm_setcsr(0x1f80); }  // the architecture's default: all exceptions masked
  ~StandardFloats() { _mm_setcsr(old_); }

 private:
  unsigned old_;
#elif defined(__aarch64__)
  StandardFloats() {
    asm volatile("mrs %0, fpcr" : "=r"(old_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t(0)));
  }
  ~StandardFloats() { asm volatile("msr fpcr, %0" : : "r"(old_)); }

 private:
  uint64_t old_;
#endif
};

const Kernels& kernels(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512") return kAvx512;
  if (name == "avx2") return kAvx2;
#endif
  if (name == "plain") return kPlain;
  throw std::invalid_argument("unknown instruction set: " + name);
}

ChunkFunction function_of(const Kernels& kernels, int rule, DType dtype, DType state) {
  const ChunkFunction found = kernels.find(rule, dtype, state);
  if (found == nullptr) throw std::invalid_argument("zokern: " + wrong_with(rule, dtype, state));
  return found;
}

// Calls work(first, last) on pieces of [0, n) from `threads` threads; pieces are claimed in order of need.
template <class Work>
void parallel(int64_t n, int64_t piece, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto claim = [&] {
    const StandardFloats guard;
    for (int64_t i; (i = next.fetch_add(piece, std::memory_order_relaxed)) < n;) work(i, std::min(i + piece, n));
  };
  threads = int(std::min<int64_t>(std::max(threads, 1), (n + piece - 1) / piece));
  std::vector<std::thread> helpers;
  helpers.reserve(size_t(std::max(threads - 1, 0)));
  try {
    for (int t = 1; t < threads; ++t) helpers.emplace_back(claim);
  } catch (const std::system_error&) {
    // No further thread to be had: those that started, and this one, do the work.
  }
  claim();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    names.push_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    names.push_back("avx2");
#endif
  names.push_back("plain");
  return names;
}

void run(const Pass& pass, int rule, DType dtype, DType state, int threads, const std::string& isa) {
  const ChunkFunction chunks = function_of(kernels(isa), rule, dtype, state);
  if (pass.enabled != nullptr && *pass.enabled == 0) return;
  // Four chunks of 16384 elements are some 20 microseconds of work: less is not worth a thread or a claim.
  parallel(pass.num_chunks, 4, threads, [&](int64_t first, int64_t last) { chunks(pass, first, last); });
}

void run_chain(const Chain& chain, int rule, DType dtype, DType state, int threads, const std::string& isa) {
  const Kernels& k = kernels(isa);
  const ChunkFunction chunks = function_of(k, rule, dtype, state);
  const int perturbation = rules()[size_t(rule)].perturbation;
  // A perturbation without states does not care how the rule's are stored.
  const DType its_state = rules()[size_t(perturbation)].states > 0 ? state : DType::f32;
  const StagePasses passes(chain, chunks, function_of(k, perturbation, dtype, its_state));
  parallel(chain.num_chunks, 4, threads, [&](int64_t first, int64_t last) { passes.run(first, last); });
}

void fill_factors(const FactorFill& fill, int threads, const std::string& isa) {
  const Kernels& k = kernels(isa);
  parallel(fill.num_chunks * fill.num_seeds, 4, threads,
           [&](int64_t first, int64_t last) { k.fill_factors(fill, first, last); });
}

uint64_t normal_checksum(uint64_t first, uint64_t last, int threads, const std::string& isa) {
  const Kernels& k = kernels(isa);
  std::atomic<uint64_t> sum{0};
  constexpr int64_t piece = 1 << 20;
  parallel(int64_t(last - first), piece, threads,
           [&](int64_t a, int64_t b) { sum += k.normal_checksum(first + uint64_t(a), first + uint64_t(b)); });
  return sum;
}

}  // namespace cpu
}  // namespace zk
