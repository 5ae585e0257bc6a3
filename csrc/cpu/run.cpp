// Chooses the instruction set at run time and splits the chunks over threads.
//
// Every thread computes with round-to-nearest and no flush-to-zero, whatever the process has set, and puts the old
// state back.
#include "run.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "../rule_info.h"
#include "chain.h"
#include "threads.h"
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

// What every processor of this kind has.
#if defined(__aarch64__)
constexpr char kBaseline[] = "neon";
#else
constexpr char kBaseline[] = "plain";
#endif

const Kernels& kernels(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512") return kAvx512;
  if (name == "avx2") return kAvx2;
#endif
  if (name == kBaseline) return kPlain;
  throw std::invalid_argument("unknown instruction set: " + name);
}

ChunkFunction function_of(const Kernels& kernels, int rule, DType dtype, DType state) {
  const ChunkFunction found = kernels.find(rule, dtype, state);
  if (found == nullptr) throw std::invalid_argument("zokern: " + wrong_with(rule, dtype, state));
  return found;
}

// Less is not worth a second thread: some 20 microseconds of drawing.
constexpr int64_t kAlone = 4 * kChunk;

// Whether `times` the elements of these chunks, of the tensors or sides that they name, are more than that.
template <class Row>
bool is_small(const Row* rows, const ChunkRow* chunks, int64_t num_chunks, int64_t times) {
  int64_t seen = 0;
  for (int64_t i = 0; i < num_chunks && seen <= kAlone; ++i)
    seen += std::max<int64_t>(times, 1) * std::min<int64_t>(rows[chunks[i].tensor].numel, kChunk);
  return seen <= kAlone;
}

// Calls work(first, last) on pieces of [0, n) from `threads` threads; pieces are claimed in order of need.
template <class Work>
void parallel(int64_t n, int64_t piece, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto claim = [&] {
    const StandardFloats guard;
    for (int64_t i; (i = next.fetch_add(piece, std::memory_order_relaxed)) < n;) work(i, std::min(i + piece, n));
  };
  const int64_t pieces = (n + piece - 1) / piece;
  using Claim = const decltype(claim);
  on_threads(threads, pieces, [](void* data) { (*static_cast<Claim*>(data))(); }, (void*)&claim);
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
  names.push_back(kBaseline);
  return names;
}

void run(const Pass& pass, int rule, DType dtype, DType state, int threads, const std::string& isa) {
  const ChunkFunction chunks = function_of(kernels(isa), rule, dtype, state);
  if (pass.enabled != nullptr && *pass.enabled == 0) return;
  if (is_small(pass.tensors, pass.chunks, pass.num_chunks, pass.num_seeds)) threads = 1;
  parallel(pass.num_chunks, 4, threads, [&](int64_t first, int64_t last) { chunks(pass, first, last); });
}

void run_chain(const Chain& chain, int rule, DType dtype, DType state, int threads, const std::string& isa) {
  const Kernels& k = kernels(isa);
  const ChunkFunction chunks = function_of(k, rule, dtype, state);
  const int perturbation = rules()[size_t(rule)].perturbation;
  // A perturbation without states does not care how the rule's are stored.
  const DType its_state = rules()[size_t(perturbation)].states > 0 ? state : DType::f32;
  const StagePasses passes(chain, chunks, function_of(k, perturbation, dtype, its_state));
  if (is_small(chain.tensors, chain.chunks, chain.num_chunks, chain.num_stages)) threads = 1;
  parallel(chain.num_chunks, 4, threads, [&](int64_t first, int64_t last) { passes.run(first, last); });
}

void fill_factors(const FactorFill& fill, int threads, const std::string& isa) {
  const Kernels& k = kernels(isa);
  if (is_small(fill.sides, fill.chunks, fill.num_chunks, fill.num_seeds)) threads = 1;
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
