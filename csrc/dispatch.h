// From a rule's number and two dtypes to the function that serves them: once before a pass, on the thread that asked.
// Half and BFloat, what a build stores 16-bit numbers as, are declared before this is included.
#pragma once
#include "rules.h"

namespace zk {
namespace ZK_ISA {

template <class Share, class S, class R>
typename Share::Function function_for(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return Share::template kFunction<float, S, R>;
    case DType::f16:
      return Share::template kFunction<Half, S, R>;
    case DType::bf16:
      return Share::template kFunction<BFloat, S, R>;
  }
  return nullptr;
}

template <class Share, class R>
typename Share::Function function_of(DType dtype, DType state) {
  if constexpr (Share::template kHas<R>) {
    if constexpr (R::kHalfState) {
      if (state == DType::bf16) return function_for<Share, BFloat, R>(dtype);
    }
    if (state == DType::f32) return function_for<Share, float, R>(dtype);
  }
  return nullptr;
}

template <class Share, class... R>
typename Share::Function find(Rules<R...>, int rule, DType dtype, DType state) {
  constexpr typename Share::Function (*of_rule[])(DType, DType) = {function_of<Share, R>...};
  return rule >= 0 && rule < int(sizeof...(R)) ? of_rule[rule](dtype, state) : nullptr;
}

// Share::kFunction<T, S, R> for weights T and states S of the rule R with this number; null where the share has none.
// A share of the list: kHas<R> says which rules are in it, Function is a pointer's type. A source file instantiates its
// share and no other, because functions take long to compile.
template <class Share>
typename Share::Function find(int rule, DType dtype, DType state) {
  return find<Share>(AllRules(), rule, dtype, state);
}

}  // namespace ZK_ISA
}  // namespace zk
