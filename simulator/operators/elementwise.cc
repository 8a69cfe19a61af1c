// Operators that take each element by itself: arithmetic, comparison, choice, functions of one number.
// Sources: headers aclnn_*.h of CANN 8.1, and the documentation of ops-math (broadcasting, promotion of dtypes).
#include "elementwise.h"

#include <cmath>

namespace sim {
namespace {

// Which dtypes an operator takes and gives.
enum Kind {
  ANY,      // whatever it is given
  REAL,     // whole numbers too, but results are floating-point
  FLOATS,   // floating-point alone
  BITS,     // whole numbers and bool alone
};

void check_kind(const Op &op, std::initializer_list<int> inputs, int out, Kind kind) {
  for (int i : inputs) {
    if (kind == FLOATS) op.types(i, {FLOAT32, FLOAT16, BFLOAT16});
    if (kind == BITS) op.types(i, {BOOL, INT8, INT16, INT32, INT64, UINT8, UINT16});
  }
  if (kind == REAL || kind == FLOATS) op.types(out, {FLOAT32, FLOAT16, BFLOAT16, FLOAT64});
}

// Where whole numbers would lose a fraction the operator computes in float32.
Arithmetic arithmetic_for(Arithmetic arithmetic, bool has_fractions) {
  return arithmetic == Arithmetic::WHOLE && has_fractions ? Arithmetic::SINGLE : arithmetic;
}

template <class Function>
int unary(const char *name, const aclTensor *self, const aclTensor *out, Kind kind, uint64_t *workspace,
          aclOpExecutor **executor, Function function) {
  return plan(name, workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), y = op.output("out", out);
    op.shape(y, op[x].shape);
    check_kind(op, {x}, y, kind);
    const Arithmetic arithmetic = arithmetic_for(arithmetic_of({op[x].type}), kind == REAL);
    op.run([=](const Tensors &t) { map(arithmetic, t[x], t[y], function); });
  });
}

template <class Function>
int binary(const char *name, const aclTensor *self, const aclTensor *other, const aclTensor *out, Kind kind,
           uint64_t *workspace, aclOpExecutor **executor, Function function) {
  return plan(name, workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), y = op.input("other", other), z = op.output("out", out);
    op.shape(z, broadcast_shapes(op[x].shape, op[y].shape));
    check_kind(op, {x, y}, z, kind);
    const Arithmetic arithmetic = arithmetic_for(arithmetic_of({op[x].type, op[y].type}), kind == REAL);
    op.run([=](const Tensors &t) { map(arithmetic, t[x], t[y], t[z], function); });
  });
}

// A scalar takes part in the arithmetic of its own dtype: 1.5 times a whole number is no whole number.
template <class Function>
int with_scalar(const char *name, const aclTensor *self, const aclScalar *other, const aclTensor *out, Kind kind,
                uint64_t *workspace, aclOpExecutor **executor, Function function) {
  return plan(name, workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), y = op.output("out", out);
    const double scalar = op.number("other", other);
    op.shape(y, op[x].shape);
    check_kind(op, {x}, y, kind);
    const Arithmetic arithmetic = arithmetic_for(arithmetic_of({op[x].type}), kind == REAL || is_float(other->type));
    op.run([=](const Tensors &t) {
      map(arithmetic, t[x], t[y], [=](auto value) { return function(value, static_cast<decltype(value)>(scalar)); });
    });
  });
}

// self + alpha · other, or minus it.
int sum(const char *name, const aclTensor *self, const aclTensor *other, const aclScalar *alpha, double sign,
        const aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
  const double factor = alpha == nullptr ? sign : sign * alpha->number;
  return binary(name, self, other, out, ANY, workspace, executor,
                [=](auto x, auto y) { return x + static_cast<decltype(y)>(factor) * y; });
}

int sum(const char *name, const aclTensor *self, const aclScalar *other, const aclScalar *alpha, double sign,
        const aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
  const double factor = alpha == nullptr ? sign : sign * alpha->number;
  return with_scalar(name, self, other, out, ANY, workspace, executor,
                     [=](auto x, auto y) { return x + static_cast<decltype(y)>(factor) * y; });
}

template <class Number>
Number floor_divide(Number x, Number y) {
  return static_cast<Number>(std::floor(static_cast<double>(x) / static_cast<double>(y)));
}

template <class Number>
Number remainder(Number x, Number y) {  // of the divisor's sign
  const double rest = std::fmod(static_cast<double>(x), static_cast<double>(y));
  return static_cast<Number>(rest != 0 && (rest < 0) != (y < 0) ? rest + y : rest);
}

}  // namespace
}  // namespace sim

using namespace sim;

#define UNARY(name, kind, expression)                                                                           \
  SIM_OPERATOR(name)                                                                                             \
  extern "C" int name##GetWorkspaceSize(const aclTensor *self, aclTensor *out, uint64_t *workspace,              \
                                        aclOpExecutor **executor) {                                              \
    return unary(#name, self, out, kind, workspace, executor, [](auto x) { return expression; });               \
  }

UNARY(aclnnAbs, ANY, x < 0 ? -x : x)
UNARY(aclnnNeg, ANY, -x)
UNARY(aclnnSign, ANY, (x > 0) - (x < 0))
UNARY(aclnnLogicalNot, ANY, x == 0)
UNARY(aclnnBitwiseNot, BITS, ~static_cast<int64_t>(x))
UNARY(aclnnIsFinite, ANY, std::isfinite(static_cast<double>(x)))
UNARY(aclnnFloor, ANY, std::floor(x))
UNARY(aclnnCeil, ANY, std::ceil(x))
UNARY(aclnnExp, REAL, std::exp(x))
UNARY(aclnnLog, REAL, std::log(x))
UNARY(aclnnSqrt, REAL, std::sqrt(x))
UNARY(aclnnRsqrt, REAL, 1 / std::sqrt(x))
UNARY(aclnnReciprocal, REAL, 1 / x)
UNARY(aclnnSin, REAL, std::sin(x))
UNARY(aclnnCos, REAL, std::cos(x))
UNARY(aclnnTanh, REAL, std::tanh(x))
UNARY(aclnnErf, REAL, std::erf(x))
UNARY(aclnnSigmoid, FLOATS, 1 / (1 + std::exp(-x)))
UNARY(aclnnSilu, FLOATS, x / (1 + std::exp(-x)))

#define BINARY(name, kind, expression)                                                                          \
  SIM_OPERATOR(name)                                                                                             \
  extern "C" int name##GetWorkspaceSize(const aclTensor *self, const aclTensor *other, aclTensor *out,           \
                                        uint64_t *workspace, aclOpExecutor **executor) {                         \
    return binary(#name, self, other, out, kind, workspace, executor,                                           \
                  [](auto x, auto y) { return expression; });                                                    \
  }

BINARY(aclnnMul, ANY, x * y)
BINARY(aclnnDiv, REAL, x / y)
BINARY(aclnnFloorDivide, ANY, floor_divide(x, y))
BINARY(aclnnRemainderTensorTensor, ANY, sim::remainder(x, y))
BINARY(aclnnPowTensorTensor, ANY, std::pow(x, y))
BINARY(aclnnMaximum, ANY, x > y || x != x ? x : y)
BINARY(aclnnMinimum, ANY, x < y || x != x ? x : y)
BINARY(aclnnEqTensor, ANY, x == y)
BINARY(aclnnNeTensor, ANY, x != y)
BINARY(aclnnGtTensor, ANY, x > y)
BINARY(aclnnGeTensor, ANY, x >= y)
BINARY(aclnnLtTensor, ANY, x < y)
BINARY(aclnnLeTensor, ANY, x <= y)
BINARY(aclnnLogicalAnd, ANY, x != 0 && y != 0)
BINARY(aclnnLogicalOr, ANY, x != 0 || y != 0)
BINARY(aclnnLogicalXor, ANY, (x != 0) != (y != 0))
BINARY(aclnnBitwiseAndTensor, BITS, static_cast<int64_t>(x) & static_cast<int64_t>(y))
BINARY(aclnnBitwiseOrTensor, BITS, static_cast<int64_t>(x) | static_cast<int64_t>(y))

#define WITH_SCALAR(name, kind, expression)                                                                     \
  SIM_OPERATOR(name)                                                                                             \
  extern "C" int name##GetWorkspaceSize(const aclTensor *self, const aclScalar *other, aclTensor *out,           \
                                        uint64_t *workspace, aclOpExecutor **executor) {                         \
    return with_scalar(#name, self, other, out, kind, workspace, executor,                                      \
                       [](auto x, auto y) { return expression; });                                               \
  }

WITH_SCALAR(aclnnMuls, ANY, x * y)
WITH_SCALAR(aclnnDivs, REAL, x / y)
WITH_SCALAR(aclnnFloorDivides, ANY, floor_divide(x, y))
WITH_SCALAR(aclnnRemainderTensorScalar, ANY, sim::remainder(x, y))
WITH_SCALAR(aclnnPowTensorScalar, ANY, std::pow(x, y))
WITH_SCALAR(aclnnEqScalar, ANY, x == y)
WITH_SCALAR(aclnnNeScalar, ANY, x != y)
WITH_SCALAR(aclnnGtScalar, ANY, x > y)
WITH_SCALAR(aclnnGeScalar, ANY, x >= y)
WITH_SCALAR(aclnnLtScalar, ANY, x < y)
WITH_SCALAR(aclnnLeScalar, ANY, x <= y)
WITH_SCALAR(aclnnClampMin, ANY, x < y ? y : x)

#define SUM(name, Other, sign)                                                                                   \
  SIM_OPERATOR(name)                                                                                             \
  extern "C" int name##GetWorkspaceSize(const aclTensor *self, const Other *other, const aclScalar *alpha,       \
                                        aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {         \
    return sum(#name, self, other, alpha, sign, out, workspace, executor);                                       \
  }

SUM(aclnnAdd, aclTensor, 1)
SUM(aclnnSub, aclTensor, -1)
SUM(aclnnAdds, aclScalar, 1)
SUM(aclnnSubs, aclScalar, -1)

#define IN_PLACE_SUM(name, Other, sign)                                                                          \
  SIM_OPERATOR(name)                                                                                             \
  extern "C" int name##GetWorkspaceSize(aclTensor *self, const Other *other, const aclScalar *alpha,             \
                                        uint64_t *workspace, aclOpExecutor **executor) {                         \
    return sum(#name, self, other, alpha, sign, self, workspace, executor);                                      \
  }

IN_PLACE_SUM(aclnnInplaceAdd, aclTensor, 1)
IN_PLACE_SUM(aclnnInplaceSub, aclTensor, -1)
IN_PLACE_SUM(aclnnInplaceAdds, aclScalar, 1)
IN_PLACE_SUM(aclnnInplaceSubs, aclScalar, -1)

#define IN_PLACE(name, Other, plan_of, kind, expression)                                                        \
  SIM_OPERATOR(name)                                                                                             \
  extern "C" int name##GetWorkspaceSize(aclTensor *self, const Other *other, uint64_t *workspace,                \
                                        aclOpExecutor **executor) {                                              \
    return plan_of(#name, self, other, self, kind, workspace, executor,                                         \
                   [](auto x, auto y) { return expression; });                                                   \
  }

IN_PLACE(aclnnInplaceMul, aclTensor, binary, ANY, x * y)
IN_PLACE(aclnnInplaceMuls, aclScalar, with_scalar, ANY, x * y)
IN_PLACE(aclnnInplaceDiv, aclTensor, binary, REAL, x / y)
IN_PLACE(aclnnInplaceDivs, aclScalar, with_scalar, REAL, x / y)

SIM_OPERATOR(aclnnSiluBackward)
extern "C" int aclnnSiluBackwardGetWorkspaceSize(const aclTensor *gradient, const aclTensor *self, aclTensor *out,
                                                 uint64_t *workspace, aclOpExecutor **executor) {
  return binary("aclnnSiluBackward", gradient, self, out, FLOATS, workspace, executor, [](auto dy, auto x) {
    const auto gate = 1 / (1 + std::exp(-x));
    return dy * gate * (1 + x * (1 - gate));
  });
}

SIM_OPERATOR(aclnnSigmoidBackward)
extern "C" int aclnnSigmoidBackwardGetWorkspaceSize(const aclTensor *gradient, const aclTensor *output, aclTensor *out,
                                                    uint64_t *workspace, aclOpExecutor **executor) {
  return binary("aclnnSigmoidBackward", gradient, output, out, FLOATS, workspace, executor,
                [](auto dy, auto y) { return dy * y * (1 - y); });
}

SIM_OPERATOR(aclnnSWhere)
extern "C" int aclnnSWhereGetWorkspaceSize(const aclTensor *condition, const aclTensor *self, const aclTensor *other,
                                           aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnSWhere", workspace, executor, [&](Op &op) {
    const int c = op.input("condition", condition), x = op.input("self", self), y = op.input("other", other),
              z = op.output("out", out);
    op.types(c, {BOOL, UINT8});
    op.shape(z, broadcast_shapes(op[c].shape, broadcast_shapes(op[x].shape, op[y].shape)));
    const Arithmetic arithmetic = arithmetic_of({op[x].type, op[y].type});
    op.run([=](const Tensors &t) {
      in_arithmetic(arithmetic, [&](auto zero) {
        using Number = decltype(zero);
        const auto condition = read<int64_t>(broadcast(t[c], t[z].shape));
        auto chosen = read<Number>(broadcast(t[x], t[z].shape));
        const auto others = read<Number>(broadcast(t[y], t[z].shape));
        for (size_t i = 0; i < chosen.size(); ++i) chosen[i] = condition[i] ? chosen[i] : others[i];
        write(t[z], chosen);
      });
    });
  });
}
