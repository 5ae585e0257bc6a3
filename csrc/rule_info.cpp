#include "rule_info.h"

#include <type_traits>

#define ZK_ISA listed  // of which nothing is compiled but the list
#include "rules.h"

namespace zk {
namespace {

using namespace listed;

template <class Wanted, class... R>
constexpr int place_in(Rules<R...>) {
  int place = 0, found = -1;
  ((found = std::is_same_v<Wanted, R> ? place : found, ++place), ...);
  return found;
}

template <class R>
RuleInfo info_of() {
  constexpr int perturbation = place_in<typename R::Perturbation>(AllRules());
  static_assert(perturbation >= 0, "a rule's perturbation is in the list too");
  static_assert(R::kStates <= 2 && R::kWritten <= R::kStates, "pass.h has room for two states");
  static_assert(R::kStates > 0 || !R::kHalfState, "kHalfState is of a rule with states");
  constexpr int squares = R::kSquares < 0 ? -1 : int(R::kDirect) + R::kSquares;
  return {R::kName,   perturbation, int(R::kDirect) + R::kSums, R::kScalars, R::kStates, R::kWritten, squares,
          R::kDirect, R::kHalfState};
}

template <class... R>
std::vector<RuleInfo> all(Rules<R...>) {
  return {info_of<R>()...};
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::f16:
      return "float16";
    case DType::bf16:
      return "bfloat16";
  }
  return nullptr;
}

}  // namespace

const std::vector<RuleInfo>& rules() {
  static const std::vector<RuleInfo> made = all(AllRules());
  return made;
}

std::string wrong_with(int rule, DType dtype, DType state) {
  if (rule < 0 || size_t(rule) >= rules().size()) {
    std::string names;
    for (const RuleInfo& known : rules()) names += std::string(names.empty() ? "" : ", ") + known.name;
    return "rule " + std::to_string(rule) + " is none of this build's (" + names +
           "); rebuild zokern._C: pip install --no-build-isolation -e .";
  }
  const std::string known = " is none of this build's (0 float32, 1 float16, 2 bfloat16)";
  if (name_of(dtype) == nullptr)
    return "dtype " + std::to_string(int(dtype)) + known + "; pass tensors of one of these";
  if (name_of(state) == nullptr)
    return "state dtype " + std::to_string(int(state)) + known + "; keep states in one of these";
  const RuleInfo& info = rules()[size_t(rule)];
  if (state == DType::f32 || (state == DType::bf16 && info.half_state)) return {};
  return std::string("the compiled rule ") + info.name + " has no states of " + name_of(state) +
         "; keep them in float32" + (info.half_state ? " or bfloat16" : "");
}

}  // namespace zk
