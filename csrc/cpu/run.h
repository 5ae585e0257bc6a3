// CPU entry points: choose the instruction set at run time, split the chunks over threads.
#pragma once
#include <string>
#include <vector>

#include "../pass.h"

namespace zk {
namespace cpu {

// Instruction sets that were built and that this processor has, best first: "avx512", "avx2", "plain".
std::vector<std::string> instruction_sets();

void run(const Pass&, RuleId, DType, DType state, int threads, const std::string& instruction_set);
void run_chain(const Chain&, RuleId, DType, DType state, int threads, const std::string& instruction_set);
uint64_t normal_checksum(uint64_t first, uint64_t last, int threads, const std::string& instruction_set);

}  // namespace cpu
}  // namespace zk
