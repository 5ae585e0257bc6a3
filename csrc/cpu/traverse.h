// The CPU traversal of chunks: walks tiles, hands them to tile.h. Included once per instruction set, whose build
// defines ZK_ISA; what each exports is in kernels.h.
#pragma once
#include "../tile.h"
#include "kernels.h"
#include "lanes.h"
// After Half and BFloat, which it names.
#include "../dispatch.h"

namespace zk {
namespace ZK_ISA {

// Whether a rule has an instance for each distribution and rounding (axpy.cpp): most steps consist of the rule without
// sums. Of others one instance looks both up (rules.cpp).
template <class R>
constexpr bool kHasInstances = R::kSums == 0;
cpu::ChunkFunction find_instances(int rule, DType, DType state);
uint64_t normal_checksum(uint64_t first, uint64_t last);
void fill_factors(const FactorFill&, int64_t first, int64_t last);

// Tiles first .. last-1 of the chunk at `base`, counted from it. Cut tiles touch only the elements inside the span.
template <class T, class S, class R, Distribution D, Rounding Q, bool kCut, class U>
void rule_tiles(const TensorRow& t, const Span span, const U& u, int64_t base, int64_t first, int64_t last) {
  const Places<T, S> p = places<T, S, R>(t, base);
  for (int64_t i = first; i < last; ++i) {
    const int64_t at = i * Lanes::kTile, index = base + at;
    const int lo = kCut && index < span.begin ? int(span.begin - index) : 0;
    const int hi = kCut && index + Lanes::kTile > span.end ? int(span.end - index) : Lanes::kTile;
    rule_tile<Lanes, T, S, R, D, Q, kCut>(u, p, at, uint64_t(base), uint32_t(i * Lanes::kWidth), lo, hi);
  }
}

// Fits every pass of that distribution.
template <class R, Distribution D>
auto uniform_of(const Pass& pass, int row) {
  if constexpr (D == Distribution::low_rank)
    return low_rank_uniform<R>(pass, row);
  else
    return any_uniform<R>(pass, pass.tensors[row]);
}

template <class T, class S, class R, Distribution D, Rounding Q>
void rule_chunks(const Pass& pass, int64_t first, int64_t last) {
  for (int64_t c = first; c < last; ++c) {
    const TensorRow& t = pass.tensors[pass.chunks[c].tensor];
    const Span span = span_of(t, pass.chunks[c]);
    const auto any = uniform_of<R, D>(pass, pass.chunks[c].tensor);
    constexpr int64_t tile = Lanes::kTile;
    const int64_t base = span.begin & ~(kChunk - 1), begin = span.begin - base, end = span.end - base;
    const int64_t touched = begin / tile, touched_end = (end + tile - 1) / tile;
    const int64_t whole = (begin + tile - 1) / tile, whole_end = end / tile;
    if (whole > touched) rule_tiles<T, S, R, D, Q, true>(t, span, any, base, touched, whole);
    const auto go = [&](const auto& u) { rule_tiles<T, S, R, D, Q, false>(t, span, u, base, whole, whole_end); };
    if constexpr (D == Distribution::low_rank)
      go(any);
    else
      with_uniform<R>(pass, any, go);
    if (whole_end < touched_end && whole_end >= whole)
      rule_tiles<T, S, R, D, Q, true>(t, span, any, base, whole_end, touched_end);
  }
}

}  // namespace ZK_ISA
}  // namespace zk
