// Operators that run along axes: sums, means, extremes and their places, softmax, running sums.
// Sources: headers aclnn_*.h of CANN 8.1, documentation of ops-math and ops-nn. Sums in float32.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "elementwise.h"

namespace sim {
namespace {

// A tensor with the axes to be reduced moved to the end: `rows` results from `length` elements each.
struct Reduction {
  Shape order;  // of the axes
  Shape kept, reduced;
  int64_t length;
};

Reduction reduction_of(const Op &op, int x, const Shape &axes, bool keep, int out) {
  const Shape &shape = op[x].shape;
  const int64_t rank = op[x].rank();
  std::vector<bool> is_reduced(rank, axes.empty());
  for (int64_t axis : axes) {
    if (rank == 0 && (axis == 0 || axis == -1)) continue;
    op.require(axis >= -rank && axis < rank, "axis %ld is outside the tensor's %ld", axis, rank);
    const int64_t place = axis < 0 ? axis + rank : axis;
    op.require(!is_reduced[place], "axis %ld is given twice", axis);
    is_reduced[place] = true;
  }
  Reduction result{{}, {}, {}, 1};
  Shape expected;
  for (int64_t i = 0; i < rank; ++i) {
    if (!is_reduced[i]) result.order.push_back(i), result.kept.push_back(shape[i]);
    if (!is_reduced[i] || keep) expected.push_back(is_reduced[i] ? 1 : shape[i]);
  }
  for (int64_t i = 0; i < rank; ++i) {
    if (is_reduced[i]) result.order.push_back(i), result.reduced.push_back(shape[i]), result.length *= shape[i];
  }
  op.shape(out, expected);
  return result;
}

// out = function(pointer to a row, its length) for each row.
template <class Function>
void reduce(Arithmetic arithmetic, const Reduction &how, const Tensor &x, const Tensor &out, Function function) {
  in_arithmetic(arithmetic, [&](auto zero) {
    using Number = decltype(zero);
    const auto values = read<Number>(permute(x, how.order));
    std::vector<Number> results(product(how.kept));
    for (size_t i = 0; i < results.size(); ++i) {
      results[i] = static_cast<Number>(function(values.data() + i * how.length, how.length));
    }
    write(out, results);
  });
}

template <class Function>
int reduction(const char *name, const aclTensor *self, const aclIntArray *dims, bool keep, aclTensor *out, bool whole,
              uint64_t *workspace, aclOpExecutor **executor, Function function) {
  return plan(name, workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), y = op.output("out", out);
    const Shape axes = op.setting("dim", dims);
    const Reduction how = reduction_of(op, x, axes, op.setting("keepDim", keep), y);
    Arithmetic arithmetic = arithmetic_of({op[x].type});
    if (arithmetic == Arithmetic::WHOLE && (!whole || is_float(op[y].type))) arithmetic = Arithmetic::SINGLE;
    op.run([=](const Tensors &t) { reduce(arithmetic, how, t[x], t[y], function); });
  });
}

constexpr auto kSum = [](auto *row, int64_t length) {
  return std::accumulate(row, row + length, std::decay_t<decltype(*row)>(0));
};
constexpr auto kLargest = [](auto *row, int64_t length) { return *std::max_element(row, row + length); };
constexpr auto kSmallest = [](auto *row, int64_t length) { return *std::min_element(row, row + length); };

// The largest or smallest of each row along one axis and, or only, its first place.
int extreme(const char *name, const aclTensor *self, int64_t dim, bool keep, bool largest, aclTensor *out,
            bool has_values, aclTensor *indices, uint64_t *workspace, aclOpExecutor **executor) {
  return plan(name, workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), place = op.output("indices", indices);
    const int y = has_values ? op.output("out", out) : -1;
    const Shape axes{op.setting("dim", dim)};
    const Reduction how = reduction_of(op, x, axes, op.setting("keepDim", keep), place);
    op.types(place, {INT32, INT64});
    if (has_values) op.shape(y, op[place].shape), op.types(y, {op[x].type});
    op.require(how.length > 0, "an axis without elements has no extreme");
    const Arithmetic arithmetic = arithmetic_of({op[x].type});
    op.run([=](const Tensors &t) {
      const auto find = [=](auto *row, int64_t length) {
        return (largest ? std::max_element(row, row + length) : std::min_element(row, row + length)) - row;
      };
      in_arithmetic(arithmetic, [&](auto zero) {
        const auto values = read<decltype(zero)>(permute(t[x], how.order));
        std::vector<int64_t> places(product(how.kept));
        std::vector<decltype(zero)> found(places.size());
        for (size_t i = 0; i < places.size(); ++i) {
          places[i] = find(values.data() + i * how.length, how.length);
          found[i] = values[i * how.length + places[i]];
        }
        write(t[place], places);
        if (has_values) write(t[y], found);
      });
    });
  });
}

// Operators whose result has the shape of x and is made row by row along `dim`.
template <class Function>
int along(const char *name, const aclTensor *self, const aclTensor *second, int64_t dim, const aclTensor *out,
          bool floats, uint64_t *workspace, aclOpExecutor **executor, Function function) {
  return plan(name, workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), other = op.optional("other", second), y = op.output("out", out);
    const int64_t rank = std::max<int64_t>(op[x].rank(), 1), axis = op.setting("dim", dim);
    op.require(axis >= -rank && axis < rank, "axis %ld is outside the tensor's %ld", axis, rank);
    op.shape(y, op[x].shape);
    op.shape(other, op[x].shape);
    if (floats) {
      for (int i : {x, other, y}) op.types(i, {FLOAT32, FLOAT16, BFLOAT16, FLOAT64});
    }
    const Arithmetic arithmetic = arithmetic_of({op[x].type});
    op.run([=](const Tensors &t) {
      const auto view = [&](const Tensor &tensor) {
        return tensor.rank() ? transpose(tensor, axis < 0 ? axis + rank : axis, rank - 1) : tensor;
      };
      in_arithmetic(arithmetic, [&](auto zero) {
        using Number = decltype(zero);
        auto values = read<Number>(view(t[x]));
        const auto others = t[other] ? read<Number>(view(t[other])) : std::vector<Number>();
        const int64_t length = t[x].rank() ? t[x].dim(axis) : 1;
        for (int64_t i = 0; i + length <= int64_t(values.size()) && length; i += length) {
          function(values.data() + i, others.empty() ? nullptr : others.data() + i, length);
        }
        write(view(t[y]), values);
      });
    });
  });
}

}  // namespace
}  // namespace sim

using namespace sim;

SIM_OPERATOR(aclnnReduceSum)
extern "C" int aclnnReduceSumGetWorkspaceSize(const aclTensor *self, const aclIntArray *dims, bool keep, int dtype,
                                              aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
  (void)dtype;  // out's
  return reduction("aclnnReduceSum", self, dims, keep, out, true, workspace, executor, kSum);
}

SIM_OPERATOR(aclnnMean)
extern "C" int aclnnMeanGetWorkspaceSize(const aclTensor *self, const aclIntArray *dims, bool keep, int dtype,
                                         aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
  (void)dtype;
  return reduction("aclnnMean", self, dims, keep, out, false, workspace, executor,
                   [](auto *row, int64_t length) { return kSum(row, length) / length; });
}

SIM_OPERATOR(aclnnAmax)
extern "C" int aclnnAmaxGetWorkspaceSize(const aclTensor *self, const aclIntArray *dims, bool keep, aclTensor *out,
                                         uint64_t *workspace, aclOpExecutor **executor) {
  return reduction("aclnnAmax", self, dims, keep, out, true, workspace, executor, kLargest);
}

SIM_OPERATOR(aclnnAmin)
extern "C" int aclnnAminGetWorkspaceSize(const aclTensor *self, const aclIntArray *dims, bool keep, aclTensor *out,
                                         uint64_t *workspace, aclOpExecutor **executor) {
  return reduction("aclnnAmin", self, dims, keep, out, true, workspace, executor, kSmallest);
}

SIM_OPERATOR(aclnnMax)
extern "C" int aclnnMaxGetWorkspaceSize(const aclTensor *self, aclTensor *out, uint64_t *workspace,
                                        aclOpExecutor **executor) {
  return reduction("aclnnMax", self, nullptr, false, out, true, workspace, executor, kLargest);
}

SIM_OPERATOR(aclnnMin)
extern "C" int aclnnMinGetWorkspaceSize(const aclTensor *self, aclTensor *out, uint64_t *workspace,
                                        aclOpExecutor **executor) {
  return reduction("aclnnMin", self, nullptr, false, out, true, workspace, executor, kSmallest);
}

SIM_OPERATOR(aclnnAll)
extern "C" int aclnnAllGetWorkspaceSize(const aclTensor *self, const aclIntArray *dims, bool keep, aclTensor *out,
                                        uint64_t *workspace, aclOpExecutor **executor) {
  return reduction("aclnnAll", self, dims, keep, out, true, workspace, executor, [](auto *row, int64_t length) {
    return std::find(row, row + length, 0) == row + length;
  });
}

SIM_OPERATOR(aclnnAny)
extern "C" int aclnnAnyGetWorkspaceSize(const aclTensor *self, const aclIntArray *dims, bool keep, aclTensor *out,
                                        uint64_t *workspace, aclOpExecutor **executor) {
  return reduction("aclnnAny", self, dims, keep, out, true, workspace, executor, [](auto *row, int64_t length) {
    return std::any_of(row, row + length, [](auto x) { return x != 0; });
  });
}

SIM_OPERATOR(aclnnLinalgVectorNorm)
extern "C" int aclnnLinalgVectorNormGetWorkspaceSize(const aclTensor *self, const aclScalar *order,
                                                     const aclIntArray *dims, bool keep, int dtype, aclTensor *out,
                                                     uint64_t *workspace, aclOpExecutor **executor) {
  (void)dtype;
  const double power = order == nullptr ? 2 : order->number;
  return reduction("aclnnLinalgVectorNorm", self, dims, keep, out, false, workspace, executor,
                   [=](auto *row, int64_t length) -> double {
                     double total = 0;
                     for (int64_t i = 0; i < length; ++i) {
                       const double size = std::fabs(static_cast<double>(row[i]));
                       total = std::isinf(power) ? std::max(total, size) : total + std::pow(size, power);
                     }
                     return std::isinf(power) ? total : std::pow(total, 1 / power);
                   });
}

SIM_OPERATOR(aclnnMaxDim)
extern "C" int aclnnMaxDimGetWorkspaceSize(const aclTensor *self, int64_t dim, bool keep, aclTensor *out,
                                           aclTensor *indices, uint64_t *workspace, aclOpExecutor **executor) {
  return extreme("aclnnMaxDim", self, dim, keep, true, out, true, indices, workspace, executor);
}

SIM_OPERATOR(aclnnMinDim)
extern "C" int aclnnMinDimGetWorkspaceSize(const aclTensor *self, int64_t dim, bool keep, aclTensor *out,
                                           aclTensor *indices, uint64_t *workspace, aclOpExecutor **executor) {
  return extreme("aclnnMinDim", self, dim, keep, false, out, true, indices, workspace, executor);
}

SIM_OPERATOR(aclnnArgMax)
extern "C" int aclnnArgMaxGetWorkspaceSize(const aclTensor *self, int64_t dim, bool keep, aclTensor *out,
                                           uint64_t *workspace, aclOpExecutor **executor) {
  return extreme("aclnnArgMax", self, dim, keep, true, nullptr, false, out, workspace, executor);
}

SIM_OPERATOR(aclnnArgMin)
extern "C" int aclnnArgMinGetWorkspaceSize(const aclTensor *self, int64_t dim, bool keep, aclTensor *out,
                                           uint64_t *workspace, aclOpExecutor **executor) {
  return extreme("aclnnArgMin", self, dim, keep, false, nullptr, false, out, workspace, executor);
}

namespace {

template <class Number>
void softmax_row(Number *row, const Number *, int64_t length) {
  const Number largest = *std::max_element(row, row + length);
  Number total = 0;
  for (int64_t i = 0; i < length; ++i) total += row[i] = std::exp(row[i] - largest);
  for (int64_t i = 0; i < length; ++i) row[i] /= total;
}

template <class Number>
void log_softmax_row(Number *row, const Number *, int64_t length) {
  const Number largest = *std::max_element(row, row + length);
  Number total = 0;
  for (int64_t i = 0; i < length; ++i) total += std::exp(row[i] - largest);
  for (int64_t i = 0; i < length; ++i) row[i] -= largest + std::log(total);
}

template <class Number>
void softmax_gradient_row(Number *gradient, const Number *output, int64_t length) {
  const Number mean = std::inner_product(gradient, gradient + length, output, Number(0));
  for (int64_t i = 0; i < length; ++i) gradient[i] = output[i] * (gradient[i] - mean);
}

}  // namespace

SIM_OPERATOR(aclnnSoftmax)
extern "C" int aclnnSoftmaxGetWorkspaceSize(const aclTensor *self, int64_t dim, aclTensor *out, uint64_t *workspace,
                                            aclOpExecutor **executor) {
  return along("aclnnSoftmax", self, nullptr, dim, out, true, workspace, executor,
               [](auto *row, auto *other, int64_t length) { softmax_row(row, other, length); });
}

SIM_OPERATOR(aclnnLogSoftmax)
extern "C" int aclnnLogSoftmaxGetWorkspaceSize(const aclTensor *self, int64_t dim, aclTensor *out, uint64_t *workspace,
                                               aclOpExecutor **executor) {
  return along("aclnnLogSoftmax", self, nullptr, dim, out, true, workspace, executor,
               [](auto *row, auto *other, int64_t length) { log_softmax_row(row, other, length); });
}

SIM_OPERATOR(aclnnSoftmaxBackward)
extern "C" int aclnnSoftmaxBackwardGetWorkspaceSize(const aclTensor *gradient, const aclTensor *output, int64_t dim,
                                                    aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
  return along("aclnnSoftmaxBackward", gradient, output, dim, out, true, workspace, executor,
               [](auto *row, auto *other, int64_t length) { softmax_gradient_row(row, other, length); });
}

SIM_OPERATOR(aclnnCumsum)
extern "C" int aclnnCumsumGetWorkspaceSize(const aclTensor *self, int64_t dim, int dtype, aclTensor *out,
                                           uint64_t *workspace, aclOpExecutor **executor) {
  (void)dtype;
  return along("aclnnCumsum", self, nullptr, dim, out, false, workspace, executor,
               [](auto *row, auto *, int64_t length) { std::partial_sum(row, row + length, row); });
}
