// CPU entry points: choose the instruction set at run time, split the chunks over threads.
#pragma once
#include <string>
#include <vector>

#include "../pass.h"

namespace zk {
namespace cpu {

// Instruction sets that were built and that this processor has, best first: "avx512", "avx2", "plain"; on Arm "neon".
std::vector<std::string> instruction_sets();

// By a rule's number. Throws std::invalid_argument, and changes nothing, for a number or a dtype that there is no code
// for.
void run(const Pass&, int rule, DType, DType state, int threads, const std::string& instruction_set);
void run_chain(const Chain&, int rule, DType, DType state, int threads, const std::string& instruction_set);
void fill_factors(const FactorFill&, int threads, const std::string& instruction_set);
uint64_t normal_checksum(uint64_t first, uint64_t last, int threads, const std::string& instruction_set);

}  // namespace cpu
}  // namespace zk
