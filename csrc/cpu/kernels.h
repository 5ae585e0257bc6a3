// What every instruction set's build of axpy.cpp and rules.cpp exports, and what run.cpp chooses between.
#pragma once
#include <cstdint>

#include "../pass.h"

namespace zk {
namespace cpu {

// Does chunks first .. last-1 of a pass.
using ChunkFunction = void (*)(const Pass&, int64_t first, int64_t last);

struct Kernels {
  // Of a rule by its number, with states (if any) stored as `state`; null where there is none. It does not throw: an
  // exception's code, compiled for one instruction set, could be linked into another's.
  ChunkFunction (*find)(int rule, DType, DType state);
  // Sum over words of bits(z0)*(2w+1) + bits(z1)*(2w+2), mod 2^64: the exhaustive test of the transform.
  uint64_t (*normal_checksum)(uint64_t first, uint64_t last);
  // Items first .. last-1 of num_seeds * num_chunks.
  void (*fill_factors)(const FactorFill&, int64_t first, int64_t last);
};

extern const Kernels kPlain;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
#endif

}  // namespace cpu
}  // namespace zk
