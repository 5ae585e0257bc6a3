// Passes along directions of low rank on the GPU: where a block of eight elements lies in its matrix, and z of it out
// of the factors. The traversal is that of kernels.cuh, and a thread has one block at a time.
//
// A chunk's first element takes a 64-bit division, its blocks none. The factors of a row are read again by every row,
// from the caches: the row of V by eight elements at once, where eight lie in one row and on 16-byte boundaries.
#pragma once
#include "kernels.cuh"

namespace zk {
namespace ZK_ISA {

// (first + x) / size for the x of a chunk, below 2^14, where first < size.
//
// From 2^14 on, the quotient is 0 or 1, and the same with 2^14 for the size if what is left of it stays, as far as that
// is less than 2^14. So n = start + x < 2^15 and 2 <= size <= 2^14. With f = ceil(2^32 / size) = (2^32 + e) / size,
// e < size, n f / 2^32 is n / size + n e / (2^32 size): more by less than n / 2^32 < 2^-17, and up to the next integer
// it is at least 1 / size >= 2^-14. The high word of the product is the quotient.
struct Quotient {
  uint32_t size, start, inverse;
  ZK_FN void find(int64_t first, int64_t whole) {
    const int64_t rest = whole - first;
    size = whole < kChunk ? uint32_t(whole) : uint32_t(kChunk);
    start = whole < kChunk ? uint32_t(first) : size - uint32_t(rest < kChunk ? rest : kChunk);
    inverse = 0xffffffffu / size + 1;
  }
  ZK_FN uint32_t of(uint32_t x) const { return __umulhi(start + x, inverse); }
  // From x on to where the quotient grows; where that is beyond the chunk, at least to there.
  ZK_FN uint32_t left(uint32_t x, uint32_t quotient) const {
    return size * (quotient + 1) - (start + x);
  }
};

// A chunk of a stack of matrices, made by one thread of a block and read by all: four divisions are worth a barrier.
struct MatrixChunk {
  int64_t left, right;            // of the chunk's first element: its row of U and its column of V, in the first factor
  int64_t next_left, next_right;  // from one factor to the next
  int64_t columns;                // of a matrix
  Quotient in_row, in_matrix;     // rows of the stack, and matrices, that begin between the chunk's first element and x
  uint32_t last;                  // the stack's last row, counted from the first element's
  uint32_t eights;  // not 0: rows are whole blocks of eight

  ZK_FN void find(const FactorRow& shape, int64_t base) {
    columns = shape.columns;
    next_left = shape.rows * shape.matrices;
    next_right = columns * shape.matrices;
    const int64_t row = int64_t(uint64_t(base) / uint64_t(columns)), column = base - row * columns;
    const int64_t matrix = shape.matrices == 1 ? 0 : int64_t(uint64_t(row) / uint64_t(shape.rows));
    left = shape.left + row;
    right = shape.right + matrix * columns + column;
    in_row.find(column, columns);
    in_matrix.find(row - matrix * shape.rows, shape.rows);
    const int64_t after = next_left - 1 - row;
    last = after < kChunk ? uint32_t(after) : uint32_t(kChunk);
    eights = columns % 8 == 0;
  }
};

// What is in shared memory is to be read again where it is needed: carried along, it would take most of the registers.
ZK_FN void read_again() {
  asm volatile("" ::: "memory");
}

// Where a block of eight elements lies: those of it that are in the tensor, and all of it but for its end.
struct FactorPlace {
  const MatrixChunk& chunk;
  uint32_t x, rows;  // of its first element: counted from the chunk's, and the rows that begin between them

  ZK_FN FactorPlace(const MatrixChunk& chunk, uint32_t x) : chunk(chunk), x(x) {
    read_again();
    rows = chunk.in_row.of(x);
  }
  ZK_FN const float* left(const float* values) const { return values + chunk.left + rows; }
  ZK_FN const float* right(const float* values) const {
    return values + chunk.right + column(x, rows, chunk.in_matrix.of(rows));
  }
  // Of the element x, so many rows and matrices on from the chunk's first one: from that one's number of V to its own.
  ZK_FN int64_t column(uint32_t x, uint32_t rows, uint32_t matrices) const {
    return int64_t(x) - int64_t(uint64_t(rows - matrices) * uint64_t(chunk.columns));
  }
  ZK_FN bool in_one_row() const { return chunk.in_row.left(x, rows) >= 8; }
};

// What draws a block of eight along one direction: the factors at its first element.
struct FactorsOfBlock {
  const FactorPlace& place;
  const float *left, *right;
  int32_t rank;

  // first(u, v), then next(u, v): for each factor in order its number of U, and where its numbers of V are.
  template <class First, class Next>
  ZK_FN void factors(const float* u, const float* v, const First& first, const Next& next) const {
    __builtin_assume(__isGlobal(u));
    __builtin_assume(__isGlobal(v));
    first(*u, v);
#pragma unroll 1
    for (int k = rank - 1; k > 0; --k) {
      read_again();
      u += place.chunk.next_left;
      v += place.chunk.next_right;
      next(*u, v);
    }
  }
  template <class Load>
  ZK_FN void in_one_row(float (&z)[8], const Load& load) const {
    float v[8];
    const auto first = [&](float u, const float* p) {
      load(v, p);
    ZK_UNROLL
      for (int i = 0; i < 8; ++i) z[i] = u * v[i];
    };
    factors(left, right, first, [&](float u, const float* p) {
      load(v, p);
      ZK_UNROLL
      for (int i = 0; i < 8; ++i) z[i] = Lanes::fma(u, v[i], z[i]);
    });
  }
  // One element after another, each put behind the others: little code for what few blocks need. Elements behind the
  // stack's last row are given places in that row.
  ZK_FN void in_rows(float (&z)[8]) const {
    read_again();
    const MatrixChunk& chunk = place.chunk;
    const int64_t from = place.column(place.x, place.rows, chunk.in_matrix.of(place.rows));
    ZK_UNROLL
    for (int i = 0; i < 8; ++i) z[i] = 0.f;
#pragma unroll 1
    for (uint32_t x = place.x; x < place.x + 8; ++x) {
      read_again();
      const uint32_t rows = chunk.in_row.of(x), down = min(rows, chunk.last);
      const int64_t column = place.column(x, rows, chunk.in_matrix.of(down));
      float product;
      factors(
          left + (down - place.rows), right + (column - from), [&](float u, const float* v) { product = u * *v; },
          [&](float u, const float* v) { product = Lanes::fma(u, *v, product); });
      ZK_UNROLL
      for (int j = 0; j < 7; ++j) z[j] = z[j + 1];
      z[7] = product;
    }
  }
  ZK_FN void products(float (&z)[8]) const {
    if (place.chunk.eights != 0) {
      in_one_row(z, [](float (&v)[8], const float* p) { Lanes::load(v, p); });
    } else if (place.in_one_row()) {
      in_one_row(z, [](float (&v)[8], const float* p) {
        ZK_UNROLL
        for (int i = 0; i < 8; ++i) v[i] = p[i];
      });
    } else {
      in_rows(z);
    }
  }
};

// Lanes whose noise is made of factors. Packed pairs would save little where there is so little arithmetic.
struct FactorLanes : Lanes {
  static ZK_FN void products(f32 (&z)[8], uint64_t, uint32_t, const FactorsOfBlock& of) { of.products(z); }
};

// The directions of a pass or a stage at one block. coefs: [coefficients][num_seeds].
struct FactorSeeds {
  static constexpr bool kOne = false;
  FactorPlace place;
  const float *values, *coefs;
  int64_t of_seed;
  int32_t num_seeds, rank;
  template <class F>
  ZK_FN void each(const F& f) const {
    const float *left = place.left(values), *right = place.right(values), *own = coefs;
#pragma unroll 1
    for (int k = num_seeds; k > 0; --k, left += of_seed, right += of_seed, ++own)
      f(FactorsOfBlock{place, left, right, rank}, [&](int c) { return own[c * num_seeds]; });
  }
};

}  // namespace ZK_ISA

namespace cuda {

// The blocks of eight of a chunk that a span touches, and those among them that are whole and aligned.
struct Blocks {
  uint32_t begin, end;  // elements
  uint32_t touched, touched_end, whole, whole_end;
  ZK_FN Blocks(const Span& span, int64_t base, bool aligned) : begin(uint32_t(span.begin - base)) {
    end = uint32_t(span.end - base);
    touched = begin / 8, touched_end = (end + 7) / 8;
    whole = aligned ? (begin + 7) / 8 : touched_end;
    whole_end = aligned ? end / 8 : touched_end;
  }
  // f(b) for each whole block of this thread, where `parts` thread blocks share the chunk.
  template <class F>
  ZK_FN void each_whole(uint32_t part, uint32_t parts, const F& f) const {
#pragma unroll 1
    for (uint32_t b = whole + part * gpu::kThreads + threadIdx.x; b < whole_end; b += gpu::kThreads * parts) f(b);
  }
  // f(b, lo, hi) for the others, of which the elements [lo, hi) are in the span.
  template <class F>
  ZK_FN void each_other(uint32_t part, uint32_t parts, const F& f) const {
    if (touched == whole && touched_end == whole_end) return;
#pragma unroll 1
    for (uint32_t b = touched + part * gpu::kThreads + threadIdx.x; b < touched_end; b += gpu::kThreads * parts) {
      if (b >= whole && b < whole_end) continue;
      f(b, begin > 8 * b ? int(begin - 8 * b) : 0, end < 8 * b + 8 ? int(end - 8 * b) : 8);
    }
  }
};

// What launches a pass or a chain of low rank; null as find_axpy's.
Launch find_low_rank(int rule, DType, DType state);
ChainLaunch find_low_rank_chain(int rule, DType, DType state);
void launch_fill(const FactorFill&, cudaStream_t);

}  // namespace cuda
}  // namespace zk
