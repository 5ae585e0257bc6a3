// What every instruction set's build of axpy.cpp and rules.cpp exports, and what run.cpp chooses between.
#pragma once
#include <cstdint>

#include "../pass.h"

namespace zk {
namespace cpu {

struct Kernels {
  // Chunks first .. last-1 of a pass, whose states (if any) are stored as `state`.
  void (*axpy)(const Pass&, DType, int64_t first, int64_t last);
  void (*rule)(const Pass&, RuleId, DType, DType state, int64_t first, int64_t last);
  // Sum over words of bits(z0)*(2w+1) + bits(z1)*(2w+2), mod 2^64: the exhaustive test of the transform.
  uint64_t (*normal_checksum)(uint64_t first, uint64_t last);

  void run(const Pass& pass, RuleId id, DType dtype, DType state, int64_t first, int64_t last) const {
    if (id == RuleId::axpy)
      axpy(pass, dtype, first, last);
    else
      rule(pass, id, dtype, state, first, last);
  }
};

extern const Kernels kPlain;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
#endif

}  // namespace cpu
}  // namespace zk
