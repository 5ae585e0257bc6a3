// CUDA entry points for bindings.cpp: plain numbers in, an error string out (empty when the launch was accepted).
#pragma once
#include <string>

#include "../pass.h"

namespace zk {
namespace cuda {

// Of a rule by its number. All addresses in `pass` are device addresses. Enqueues on `stream` of `device`; allocates
// nothing, waits for nothing.
std::string run(const Pass& pass, int rule, DType, DType state, int device, void* stream);

std::string run_chain(const Chain& chain, int rule, DType, DType state, int device, void* stream);

// Makes the factors that a pass or a chain of low rank reads, on the same stream before it.
std::string fill_factors(const FactorFill& fill, int device, void* stream);

// Adds sum over words first .. last-1 of bits(z0)*(2w+1) + bits(z1)*(2w+2), mod 2^64, to *sum (device memory).
std::string normal_checksum(uint64_t first, uint64_t last, uint64_t* sum, int device, void* stream);

// Architectures in the fat binary, as built ("80 90 120"), and the toolkit's version.
std::string architectures();
std::string toolkit();

}  // namespace cuda
}  // namespace zk
