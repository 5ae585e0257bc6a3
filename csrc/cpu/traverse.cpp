// The CPU traversal of chunks: walks tiles, hands them to tile.h. Built once per instruction set (ZK_ISA, ZK_KERNELS).
#include "traverse.h"

#include "../tile.h"
#include "lanes.h"

namespace zk {
namespace ZK_ISA {

// Tiles first .. last-1 of the chunk at `base`, counted from it. Cut tiles touch only the elements inside the span.
template <class T, Distribution D, Rounding R, bool kCut, class U>
void add_noise_tiles(const TensorRow& t, const Span span, const U& u, int64_t base, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const int64_t index = base + i * Lanes::kTile;
    // The pointers of a cut tile may lie before the tensor.
    const T* src = reinterpret_cast<const T*>(t.src + (index - t.offset) * int64_t(sizeof(T)));
    T* dst = reinterpret_cast<T*>(t.dst + (index - t.offset) * int64_t(sizeof(T)));
    const int lo = kCut && index < span.begin ? int(span.begin - index) : 0;
    const int hi = kCut && index + Lanes::kTile > span.end ? int(span.end - index) : Lanes::kTile;
    axpy_tile<Lanes, T, D, R, kCut>(u, src, dst, uint64_t(base), uint32_t(i * Lanes::kWidth), lo, hi);
  }
}

template <class T, Distribution D, Rounding R>
void add_noise_chunks(const Pass& pass, int64_t first, int64_t last) {
  for (int64_t c = first; c < last; ++c) {
    const TensorRow& t = pass.tensors[pass.chunks[c].tensor];
    const Span span = span_of(t, pass.chunks[c]);
    const AnyUniform any = any_uniform(pass, t);
    constexpr int64_t tile = Lanes::kTile;
    const int64_t base = span.begin & ~(kChunk - 1), begin = span.begin - base, end = span.end - base;
    const int64_t touched = begin / tile, touched_end = (end + tile - 1) / tile;
    const int64_t whole = (begin + tile - 1) / tile, whole_end = end / tile;
    if (whole > touched) add_noise_tiles<T, D, R, true>(t, span, any, base, touched, whole);
    with_uniform(pass, any,
                 [&](const auto& u) { add_noise_tiles<T, D, R, false>(t, span, u, base, whole, whole_end); });
    if (whole_end < touched_end && whole_end >= whole)
      add_noise_tiles<T, D, R, true>(t, span, any, base, whole_end, touched_end);
  }
}

template <class T, Distribution D>
void add_noise_rounded(const Pass& pass, Rounding r, int64_t first, int64_t last) {
  if constexpr (sizeof(T) == 2) {
    if (r == Rounding::stochastic) return add_noise_chunks<T, D, Rounding::stochastic>(pass, first, last);
  }
  add_noise_chunks<T, D, Rounding::nearest>(pass, first, last);
}

template <class T>
void add_noise_typed(const Pass& pass, Distribution d, Rounding r, int64_t first, int64_t last) {
  if (d == Distribution::normal)
    add_noise_rounded<T, Distribution::normal>(pass, r, first, last);
  else
    add_noise_rounded<T, Distribution::rademacher>(pass, r, first, last);
}

static void add_noise(const Pass& pass, DType dtype, Distribution d, Rounding r, int64_t first, int64_t last) {
  if (dtype == DType::f32) add_noise_typed<float>(pass, d, r, first, last);
  if (dtype == DType::f16) add_noise_typed<Half>(pass, d, r, first, last);
  if (dtype == DType::bf16) add_noise_typed<BFloat>(pass, d, r, first, last);
}

static uint64_t normal_checksum(uint64_t first, uint64_t last) {
  uint64_t sum = 0;
  for (uint64_t w = first; w < last; w += Lanes::W) {
    Lanes::f32 z0, z1;
    normal_pair<Lanes>(Lanes::iota() + uint32_t(w), z0, z1);
    const Lanes::u32 b0 = Lanes::bits(z0), b1 = Lanes::bits(z1);
    for (int l = 0; l < Lanes::W; ++l) sum += b0[l] * (2 * (w + l) + 1) + b1[l] * (2 * (w + l) + 2);
  }
  return sum;
}

}  // namespace ZK_ISA

namespace cpu {
const Kernels ZK_KERNELS = {ZK_ISA::add_noise, ZK_ISA::normal_checksum};
}
}  // namespace zk
