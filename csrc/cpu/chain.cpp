// Chains on the CPU: one instance for each rule and dtype, which looks up distribution and rounding.
#include "../chain.h"

#include "traverse.h"

namespace zk {
namespace ZK_ISA {

// The stages of a chain as one tensor's chunk sees them.
struct ChunkStages {
  const Chain& chain;
  const TensorRow& t;
  template <class R>
  using Uniform = ZK_ISA::Uniform<R, Decay, ManySeeds, SeedKeys, StageKind>;
  template <class R>
  ZK_FN Uniform<R> uniform(int i, const StageKind& kind) const {
    const Stage& s = chain.stages[i];
    const float* scalars = s.scalars + t.group * R::kScalars;
    const ManySeeds seeds{reinterpret_cast<const uint32_t*>(s.seeds), s.coefs + t.group * s.num_seeds * kCoefs<R>,
                          s.num_seeds};
    const uint32_t* r = reinterpret_cast<const uint32_t*>(s.rounding_seed);
    const SeedKeys none{0, 0};
    return {kind,
            uint32_t(t.id),
            R(scalars),
            {scalars[0]},
            seeds,
            r != nullptr ? SeedKeys{r[0], r[1]} : none,
            r != nullptr ? SeedKeys{r[2], r[3]} : none};
  }
};

template <class T, class S, class R>
static void chain_chunks(const Chain& chain, int64_t first, int64_t last) {
  const bool enabled = chain.enabled == nullptr || *chain.enabled != 0;
  for (int64_t c = first; c < last; ++c) {
    const TensorRow& t = chain.tensors[chain.chunks[c].tensor];
    const Span span = span_of(t, chain.chunks[c]);
    constexpr int64_t tile = Lanes::kTile;
    const int64_t base = span.begin & ~(kChunk - 1), begin = span.begin - base, end = span.end - base;
    const Places<T, S> p = places<T, S, R>(t, base);
    T* probe = t.probe != 0 ? reinterpret_cast<T*>(t.probe + (base - t.offset) * int64_t(sizeof(T))) : nullptr;
    if (!enabled && (chain.fork == 0 || probe == nullptr)) continue;
    const ChunkStages stages{chain, t};
    for (int64_t i = begin / tile; i < (end + tile - 1) / tile; ++i) {
      const int64_t at = i * tile;
      const int lo = at < begin ? int(begin - at) : 0, hi = at + tile > end ? int(end - at) : int(tile);
      const auto b = uint32_t(i * Lanes::kWidth);
      if (lo == 0 && hi == tile)
        chain_tile<Lanes, T, S, R, false>(chain, enabled, stages, p, probe, at, uint64_t(base), b, lo, hi);
      else
        chain_tile<Lanes, T, S, R, true>(chain, enabled, stages, p, probe, at, uint64_t(base), b, lo, hi);
    }
  }
}

template <class S, class R>
static void typed(const Chain& chain, DType dtype, int64_t first, int64_t last) {
  if (dtype == DType::f32) chain_chunks<float, S, R>(chain, first, last);
  if (dtype == DType::f16) chain_chunks<Half, S, R>(chain, first, last);
  if (dtype == DType::bf16) chain_chunks<BFloat, S, R>(chain, first, last);
}

template <class R>
static void with_state(const Chain& chain, DType dtype, DType state, int64_t first, int64_t last) {
  if (state == DType::bf16)
    typed<BFloat, R>(chain, dtype, first, last);
  else
    typed<float, R>(chain, dtype, first, last);
}

void chain(const Chain& chain, RuleId id, DType dtype, DType state, int64_t first, int64_t last) {
  if (id == RuleId::axpy) typed<float, Axpy>(chain, dtype, first, last);
  if (id == RuleId::hizoo) with_state<HiZOO<false>>(chain, dtype, state, first, last);
  if (id == RuleId::hizoo_restore) with_state<HiZOO<true>>(chain, dtype, state, first, last);
  if (id == RuleId::helene) typed<float, Helene>(chain, dtype, first, last);
  if (id == RuleId::momentum) typed<float, Momentum>(chain, dtype, first, last);
  if (id == RuleId::adam) typed<float, Adam>(chain, dtype, first, last);
  if (id == RuleId::adamezo) typed<float, AdaMeZO>(chain, dtype, first, last);
  if (id == RuleId::sign) typed<float, Sign>(chain, dtype, first, last);
}

}  // namespace ZK_ISA
}  // namespace zk
