// Element-wise arithmetic: which numbers it is done in, and operators of one, two and three tensors made of a function.
#pragma once

#include <algorithm>

#include "../sim.h"

namespace sim {

// The arithmetic of a result: float32 holds float16 and bfloat16; whole numbers stay exact.
enum class Arithmetic { WHOLE, SINGLE, DOUBLE };

inline Arithmetic arithmetic_of(std::initializer_list<DType> types) {
  Arithmetic widest = Arithmetic::WHOLE;
  for (DType type : types) {
    if (type == FLOAT64) widest = Arithmetic::DOUBLE;
    if (is_float(type) && widest == Arithmetic::WHOLE) widest = Arithmetic::SINGLE;
  }
  return widest;
}

// Calls function with a zero of the arithmetic's C++ type.
template <class Function>
void in_arithmetic(Arithmetic arithmetic, Function &&function) {
  switch (arithmetic) {
    case Arithmetic::WHOLE: return function(int64_t{0});
    case Arithmetic::SINGLE: return function(0.0f);
    case Arithmetic::DOUBLE: return function(0.0);
  }
}

// out = function(x), element by element; function takes and gives back float, double or int64_t.
template <class Function>
void map(Arithmetic arithmetic, const Tensor &x, const Tensor &out, Function function) {
  in_arithmetic(arithmetic, [&](auto zero) {
    using Number = decltype(zero);
    auto values = read<Number>(broadcast(x, out.shape));
    for (auto &value : values) value = static_cast<Number>(function(value));
    write(out, values);
  });
}

template <class Function>
void map(Arithmetic arithmetic, const Tensor &x, const Tensor &y, const Tensor &out, Function function) {
  in_arithmetic(arithmetic, [&](auto zero) {
    using Number = decltype(zero);
    auto values = read<Number>(broadcast(x, out.shape));
    const auto others = read<Number>(broadcast(y, out.shape));
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<Number>(function(values[i], others[i]));
    write(out, values);
  });
}

}  // namespace sim
