// The first-order pass on the CPU, which most steps consist of: one instance for each distribution and rounding.
#include <algorithm>

#include "traverse.h"

namespace zk {
namespace ZK_ISA {

template <class T, class S, class R, Distribution D>
static void rounded(const Pass& pass, int64_t first, int64_t last) {
  if constexpr (sizeof(T) == 2) {
    if (pass.stochastic != 0) return rule_chunks<T, S, R, D, Rounding::stochastic>(pass, first, last);
  }
  rule_chunks<T, S, R, D, Rounding::nearest>(pass, first, last);
}

template <class T, class S, class R>
static void drawn(const Pass& pass, int64_t first, int64_t last) {
  if (pass.factors.rows != nullptr)
    rounded<T, S, R, Distribution::low_rank>(pass, first, last);
  else if (pass.rademacher != 0)
    rounded<T, S, R, Distribution::rademacher>(pass, first, last);
  else
    rounded<T, S, R, Distribution::normal>(pass, first, last);
}

struct RulesWithInstances {
  using Function = cpu::ChunkFunction;
  template <class R>
  static constexpr bool kHas = kHasInstances<R>;
  template <class T, class S, class R>
  static constexpr Function kFunction = drawn<T, S, R>;
};

cpu::ChunkFunction find_instances(int rule, DType dtype, DType state) {
  return find<RulesWithInstances>(rule, dtype, state);
}

// Items are seeds by chunks, those of a seed together.
void fill_factors(const FactorFill& fill, int64_t first, int64_t last) {
  for (int64_t item = first; item < last; ++item) {
    const int64_t k = item / fill.num_chunks;
    const ChunkRow& chunk = fill.chunks[item - k * fill.num_chunks];
    const FactorSide& side = fill.sides[chunk.tensor];
    const int64_t base = int64_t(chunk.number) * kChunk, end = std::min(side.numel - base, kChunk);
    const uint32_t* words =
        fill.seeds == nullptr ? fill.first_keys.k[0] : reinterpret_cast<const uint32_t*>(fill.seeds + k);
    const SeedKeys keys{words[0], words[1]};
    float* out = fill.values + k * fill.of_seed + side.place + base;
    for (int64_t at = 0; at < end; at += Lanes::kTile) {
      Lanes::f32 x[Lanes::kVectors];
      factor_tile<Lanes>(x, side, fill.scale, uint64_t(base), uint32_t(at / 8), keys);
      Lanes::Out<float> tile;
      Lanes::round(tile, x);
      Lanes::store_part(out + at, tile, 0, int(std::min<int64_t>(end - at, Lanes::kTile)));
    }
  }
}

uint64_t normal_checksum(uint64_t first, uint64_t last) {
  uint64_t sum = 0;
  const auto add = [&sum](uint64_t w, int count) {
    Lanes::f32 z0, z1;
    normal_pair<Lanes>(Lanes::iota() + uint32_t(w), z0, z1);
    const Lanes::u32 b0 = Lanes::bits(z0), b1 = Lanes::bits(z1);
    for (int l = 0; l < count; ++l) sum += b0[l] * (2 * (w + l) + 1) + b1[l] * (2 * (w + l) + 2);
  };
  uint64_t w = first;
  for (; w + Lanes::W <= last; w += Lanes::W) add(w, Lanes::W);
  if (w < last) add(w, int(last - w));
  return sum;
}

}  // namespace ZK_ISA
}  // namespace zk
