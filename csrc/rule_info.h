// The list of rules.h as data, for code that belongs to no instruction set.
#pragma once
#include <string>
#include <vector>

#include "pass.h"

namespace zk {

struct RuleInfo {
  const char* name;
  int perturbation;  // its number
  int coefs, scalars, states, written;
  int squares;  // which of the coefs is of squares, or -1
  bool direct, half_state;
};

// By number.
const std::vector<RuleInfo>& rules();

// What is wrong with a rule's number and dtypes, with the remedy; empty if nothing is.
std::string wrong_with(int rule, DType dtype, DType state);

}  // namespace zk
