// Operators that take each element by itself: arithmetic, comparison, choice, functions of one number.
// Sources: headers aclnn_*.h of CANN 8.1, and the documentation of ops-math (broadcasting, promotion of dtypes).
#include "elementwise.h"

#include <cmath>

namespace sim {
namespace {

constexpr auto kWhole = Arithmetic::WHOLE;

// Where whole numbers would lose a fraction the operator computes in float32.
Arithmetic at_least_single(Arithmetic arithmetic) { return arithmetic == kWhole ? Arithmetic::SINGLE : arithmetic; }

template <class Function>
int unary(const char *name, const aclTensor *self, const aclTensor *out, bool whole, uint64_t *workspace,
          aclOpExecutor **executor, Function function) {
  return plan(name, workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), y = op.output("out", out);
    op.shape(y, op[x].shape);
    const Arithmetic arithmetic = arithmetic_of({op[x].type});
    op.run([=](const Tensors &t) { map(whole ? arithmetic : at_least_single(arithmetic), t[x], t[y], function); });
  });
}

template <class Function>
int binary(const char *name, const aclTensor *self, const aclTensor *other, const aclTensor *out, bool whole,
           uint64_t *workspace, aclOpExecutor **executor, Function function) {
  return plan(name, workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), y = op.input("other", other), z = op.output("out", out);
    op.shape(z, broadcast_shapes(op[x].shape, op[y].shape));
    const Arithmetic arithmetic = arithmetic_of({op[x].type, op[y].type});
    op.run([=](const Tensors &t) {
      map(whole ? arithmetic : at_least_single(arithmetic), t[x], t[y], t[z], function);
    });
  });
}

// A scalar takes part in the arithmetic of its own dtype: 1.5 times a whole number is no whole number.
template <class Function>
int with_scalar(const char *name, const aclTensor *self, const aclScalar *other, const aclTensor *out, bool whole,
                uint64_t *workspace, aclOpExecutor **executor, Function function) {
  return plan(name, workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), y = op.output("out", out);
    const double scalar = op.number("other", other);
    op.shape(y, op[x].shape);
    Arithmetic arithmetic = arithmetic_of({op[x].type});
    if (!whole || (arithmetic == kWhole && is_float(other->type))) arithmetic = at_least_single(arithmetic);
    op.run([=](const Tensors &t) {
      map(arithmetic, t[x], t[y], [=](auto value) { return function(value, static_cast<decltype(value)>(scalar)); });
    });
  });
}

// self + alpha · other, or minus it.
int sum(const char *name, const aclTensor *self, const aclTensor *other, const aclScalar *alpha, double sign,
        const aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
  const double factor = alpha == nullptr ? sign : sign * alpha->number;
  return binary(name, self, other, out, true, workspace, executor,
                [=](auto x, auto y) { return x + static_cast<decltype(y)>(factor) * y; });
}

int sum(const char *name, const aclTensor *self, const aclScalar *other, const aclScalar *alpha, double sign,
        const aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
  const double factor = alpha == nullptr ? sign : sign * alpha->number;
  return with_scalar(name, self, other, out, true, workspace, executor,
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

#define UNARY(name, whole, expression)                                                                           \
  SIM_OPERATOR(name)                                                                                             \
  extern "C" int name##GetWorkspaceSize(const aclTensor *self, aclTensor *out, uint64_t *workspace,              \
                                        aclOpExecutor **executor) {                                              \
    return unary(#name, self, out, whole, workspace, executor, [](auto x) { return expression; });               \
  }

UNARY(aclnnAbs, true, x < 0 ? -x : x)
UNARY(aclnnNeg, true, -x)
UNARY(aclnnSign, true, (x > 0) - (x < 0))
UNARY(aclnnLogicalNot, true, x == 0)
UNARY(aclnnBitwiseNot, true, ~static_cast<int64_t>(x))
UNARY(aclnnIsFinite, false, std::isfinite(x))
UNARY(aclnnFloor, true, std::floor(x))
UNARY(aclnnCeil, true, std::ceil(x))
UNARY(aclnnExp, false, std::exp(x))
UNARY(aclnnLog, false, std::log(x))
UNARY(aclnnSqrt, false, std::sqrt(x))
UNARY(aclnnRsqrt, false, 1 / std::sqrt(x))
UNARY(aclnnReciprocal, false, 1 / x)
UNARY(aclnnSin, false, std::sin(x))
UNARY(aclnnCos, false, std::cos(x))
UNARY(aclnnTanh, false, std::tanh(x))
UNARY(aclnnErf, false, std::erf(x))
UNARY(aclnnSigmoid, false, 1 / (1 + std::exp(-x)))
UNARY(aclnnSilu, false, x / (1 + std::exp(-x)))

#define BINARY(name, whole, expression)                                                                          \
  SIM_OPERATOR(name)                                                                                             \
  extern "C" int name##GetWorkspaceSize(const aclTensor *self, const aclTensor *other, aclTensor *out,           \
                                        uint64_t *workspace, aclOpExecutor **executor) {                         \
    return binary(#name, self, other, out, whole, workspace, executor,                                           \
                  [](auto x, auto y) { return expression; });                                                    \
  }

BINARY(aclnnMul, true, x * y)
BINARY(aclnnDiv, false, x / y)
BINARY(aclnnFloorDivide, true, floor_divide(x, y))
BINARY(aclnnRemainderTensorTensor, true, sim::remainder(x, y))
BINARY(aclnnPowTensorTensor, true, std::pow(x, y))
BINARY(aclnnMaximum, true, x > y || x != x ? x : y)
BINARY(aclnnMinimum, true, x < y || x != x ? x : y)
BINARY(aclnnEqTensor, true, x == y)
BINARY(aclnnNeTensor, true, x != y)
BINARY(aclnnGtTensor, true, x > y)
BINARY(aclnnGeTensor, true, x >= y)
BINARY(aclnnLtTensor, true, x < y)
BINARY(aclnnLeTensor, true, x <= y)
BINARY(aclnnLogicalAnd, true, x != 0 && y != 0)
BINARY(aclnnLogicalOr, true, x != 0 || y != 0)
BINARY(aclnnLogicalXor, true, (x != 0) != (y != 0))
BINARY(aclnnBitwiseAndTensor, true, static_cast<int64_t>(x) & static_cast<int64_t>(y))
BINARY(aclnnBitwiseOrTensor, true, static_cast<int64_t>(x) | static_cast<int64_t>(y))

#define WITH_SCALAR(name, whole, expression)                                                                     \
  SIM_OPERATOR(name)                                                                                             \
  extern "C" int name##GetWorkspaceSize(const aclTensor *self, const aclScalar *other, aclTensor *out,           \
                                        uint64_t *workspace, aclOpExecutor **executor) {                         \
    return with_scalar(#name, self, other, out, whole, workspace, executor,                                      \
                       [](auto x, auto y) { return expression; });                                               \
  }

WITH_SCALAR(aclnnMuls, true, x * y)
WITH_SCALAR(aclnnDivs, false, x / y)
WITH_SCALAR(aclnnFloorDivides, true, floor_divide(x, y))
WITH_SCALAR(aclnnRemainderTensorScalar, true, sim::remainder(x, y))
WITH_SCALAR(aclnnPowTensorScalar, true, std::pow(x, y))
WITH_SCALAR(aclnnEqScalar, true, x == y)
WITH_SCALAR(aclnnNeScalar, true, x != y)
WITH_SCALAR(aclnnGtScalar, true, x > y)
WITH_SCALAR(aclnnGeScalar, true, x >= y)
WITH_SCALAR(aclnnLtScalar, true, x < y)
WITH_SCALAR(aclnnLeScalar, true, x <= y)
WITH_SCALAR(aclnnClampMin, true, x < y ? y : x)

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

#define IN_PLACE(name, Other, plan_of, whole, expression)                                                        \
  SIM_OPERATOR(name)                                                                                             \
  extern "C" int name##GetWorkspaceSize(aclTensor *self, const Other *other, uint64_t *workspace,                \
                                        aclOpExecutor **executor) {                                              \
    return plan_of(#name, self, other, self, whole, workspace, executor,                                         \
                   [](auto x, auto y) { return expression; });                                                   \
  }

IN_PLACE(aclnnInplaceMul, aclTensor, binary, true, x * y)
IN_PLACE(aclnnInplaceMuls, aclScalar, with_scalar, true, x * y)
IN_PLACE(aclnnInplaceDiv, aclTensor, binary, false, x / y)
IN_PLACE(aclnnInplaceDivs, aclScalar, with_scalar, false, x / y)

SIM_OPERATOR(aclnnSiluBackward)
extern "C" int aclnnSiluBackwardGetWorkspaceSize(const aclTensor *gradient, const aclTensor *self, aclTensor *out,
                                                 uint64_t *workspace, aclOpExecutor **executor) {
  return binary("aclnnSiluBackward", gradient, self, out, false, workspace, executor, [](auto dy, auto x) {
    const auto gate = 1 / (1 + std::exp(-x));
    return dy * gate * (1 + x * (1 - gate));
  });
}

SIM_OPERATOR(aclnnSigmoidBackward)
extern "C" int aclnnSigmoidBackwardGetWorkspaceSize(const aclTensor *gradient, const aclTensor *output, aclTensor *out,
                                                    uint64_t *workspace, aclOpExecutor **executor) {
  return binary("aclnnSigmoidBackward", gradient, output, out, false, workspace, executor,
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
