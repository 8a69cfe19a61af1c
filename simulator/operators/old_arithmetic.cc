// Old operators that compute: arithmetic, in-place sums, reductions, matrix products, Adam. In float32, rounded once.
#include <cmath>
#include <numeric>

#include "elementwise.h"
#include "matmul.h"
#include "old_operators.h"

namespace sim {
namespace {

// out = function(x, y) of two broadcast inputs.
template <class Function>
OldOperator binary(Function function) {
  return [=](Op &op, const Indices &in, const Indices &out, const Attributes &) {
    require_inputs(op, in, 2);
    const int x = in[0], y = in[1], z = out[0];
    op.shape(z, broadcast_shapes(op[x].shape, op[y].shape));
    const Arithmetic arithmetic = arithmetic_of({op[x].type, op[y].type});
    op.run([=](const Tensors &t) { map(arithmetic, t[x], t[y], t[z], function); });
  };
}

template <class Function>
OldOperator unary(Function function) {
  return [=](Op &op, const Indices &in, const Indices &out, const Attributes &) {
    require_inputs(op, in, 1);
    const int x = in[0], y = out[0];
    op.shape(y, op[x].shape);
    op.run([=](const Tensors &t) { map(arithmetic_of({t[x].type, FLOAT32}), t[x], t[y], function); });
  };
}

// The first input is a variable that is written in place; the output, where there is one, is the same memory.
template <class Function>
OldOperator assign(Function function) {
  return [=](Op &op, const Indices &in, const Indices &out, const Attributes &) {
    require_inputs(op, in, 2);
    const int x = in[0], y = in[1];
    broadcast(op[y], op[x].shape);
    op.run([=](const Tensors &t) {
      map(arithmetic_of({t[x].type, t[y].type}), t[x], t[y], t[x], function);
      for (int z : out) {
        if (t[z] && t[z].data != t[x].data) copy(t[z], t[x]);
      }
    });
  };
}

// out = function(a row, its length) over the axes that the second input names (all, if none).
template <class Function>
OldOperator reduction(Function function) {
  return [=](Op &op, const Indices &in, const Indices &out, const Attributes &attributes) {
    require_inputs(op, in, 2);
    const int x = in[0], y = out[0];
    const int64_t rank = op[x].rank();
    const bool keep = attribute_of(attributes, "keep_dims", 0) != 0;
    const Shape axes = constant(op, in[1]);
    std::vector<bool> is_reduced(rank, axes.empty());
    for (int64_t axis : axes) is_reduced[checked_axis(op, axis, rank)] = true;
    Shape order, expected;
    int64_t length = 1;
    for (int64_t i = 0; i < rank; ++i) {
      if (!is_reduced[i]) order.push_back(i);
      if (!is_reduced[i] || keep) expected.push_back(is_reduced[i] ? 1 : op[x].dim(i));
    }
    for (int64_t i = 0; i < rank; ++i) {
      if (is_reduced[i]) order.push_back(i), length *= op[x].dim(i);
    }
    op.shape(y, expected);
    op.require(length > 0, "there is nothing to reduce");
    op.run([=](const Tensors &t) {
      in_arithmetic(arithmetic_of({t[x].type}), [&](auto zero) {
        const auto values = read<decltype(zero)>(permute(t[x], order));
        std::vector<decltype(zero)> results;
        for (size_t row = 0; row < values.size(); row += length) results.push_back(function(&values[row], length));
        write(t[y], results);
      });
    });
  };
}

constexpr auto kSum = [](const auto *row, int64_t length) {
  return std::accumulate(row, row + length, std::decay_t<decltype(*row)>(0));
};

void add_n(Op &op, const Indices &in, const Indices &out, const Attributes &) {
  require_inputs(op, in, 1);
  for (int i : in) op.shape(i, op[out[0]].shape), op.types(i, {op[out[0]].type});
  op.run([=](const Tensors &t) {
    in_arithmetic(arithmetic_of({t[out[0]].type}), [&](auto zero) {
      auto sum = read<decltype(zero)>(t[in[0]]);
      for (size_t i = 1; i < in.size(); ++i) {
        const auto part = read<decltype(zero)>(t[in[i]]);
        for (size_t j = 0; j < sum.size(); ++j) sum[j] += part[j];
      }
      write(t[out[0]], sum);
    });
  });
}

OldOperator matrix(const char *left, const char *right) {
  return [=](Op &op, const Indices &in, const Indices &out, const Attributes &attributes) {
    require_inputs(op, in, 2);
    const int a = in[0], b = in[1], y = out[0];
    const bool turn_a = attribute_of(attributes, left, 0) != 0, turn_b = attribute_of(attributes, right, 0) != 0;
    const auto turned = [](const Tensor &x, bool turn) { return turn ? transpose(x, -2, -1) : x; };
    op.types(a, {FLOAT32, FLOAT16, BFLOAT16});
    op.types(b, {op[a].type});
    op.shape(y, product_shape(op, turned(op[a], turn_a), turned(op[b], turn_b)));
    op.run([=](const Tensors &t) { write(t[y], matrix_product(turned(t[a], turn_a), turned(t[b], turn_b))); });
  };
}

// Adam without decay; its variables are written in place.
void apply_adam(Op &op, const Indices &in, const Indices &out, const Attributes &attributes) {
  require_inputs(op, in, 10);
  op.require(attribute_of(attributes, "use_nesterov", 0) == 0, "use_nesterov is not simulated");
  for (int i : in) op.types(i, {FLOAT32});
  for (int i : {1, 2, 9}) op.shape(in[i], op[in[0]].shape);
  for (int i = 3; i < 9; ++i) op.require(op[in[i]].size() == 1, "input[%d] must have one element", i);
  op.run([=](const Tensors &t) {
    std::vector<float> numbers;
    for (int i = 3; i < 9; ++i) numbers.push_back(read<float>(t[in[i]])[0]);
    const float power1 = numbers[0], power2 = numbers[1], beta1 = numbers[3], beta2 = numbers[4];
    const float rate = numbers[2] * std::sqrt(1 - power2) / (1 - power1), epsilon = numbers[5];
    auto weights = read<float>(t[in[0]]), firsts = read<float>(t[in[1]]), seconds = read<float>(t[in[2]]);
    const auto gradients = read<float>(t[in[9]]);
    for (size_t i = 0; i < weights.size(); ++i) {
      firsts[i] += (1 - beta1) * (gradients[i] - firsts[i]);
      seconds[i] += (1 - beta2) * (gradients[i] * gradients[i] - seconds[i]);
      weights[i] -= rate * firsts[i] / (std::sqrt(seconds[i]) + epsilon);
    }
    write(t[in[0]], weights);
    write(t[in[1]], firsts);
    write(t[in[2]], seconds);
    for (size_t i = 0; i < out.size() && i < 3; ++i) {
      if (t[out[i]] && t[out[i]].data != t[in[i]].data) copy(t[out[i]], t[in[i]]);
    }
  });
}

}  // namespace

OldTable old_arithmetic() {
  const std::vector<DType> floats{FLOAT32, FLOAT16, BFLOAT16}, summed{FLOAT32, FLOAT16, BFLOAT16, INT32, INT64};
  const std::vector<DType> ordered{FLOAT32, FLOAT16, BFLOAT16, INT8, INT32, INT64};
  const std::vector<DType> reduced{FLOAT32, FLOAT16, BFLOAT16, INT8, UINT8, INT32, INT64};
  return {
      {"Add", binary([](auto x, auto y) { return x + y; })},
      {"Sub", binary([](auto x, auto y) { return x - y; })},
      {"Mul", binary([](auto x, auto y) { return x * y; })},
      {"RealDiv", binary([](auto x, auto y) { return x / y; })},
      {"BiasAdd", binary([](auto x, auto y) { return x + y; })},
      {"Maximum", of(ordered, binary([](auto x, auto y) { return x > y ? x : y; }))},
      {"Minimum", of(ordered, binary([](auto x, auto y) { return x < y ? x : y; }))},
      {"Sin", of(floats, unary([](auto x) { return std::sin(x); }))},
      {"Cos", of(floats, unary([](auto x) { return std::cos(x); }))},
      {"Exp", of(floats, unary([](auto x) { return std::exp(x); }))},
      {"Log", of(floats, unary([](auto x) { return std::log(x); }))},
      {"Sqrt", of(floats, unary([](auto x) { return std::sqrt(x); }))},
      {"Rsqrt", of(floats, unary([](auto x) { return 1 / std::sqrt(x); }))},
      {"Sigmoid", of(floats, unary([](auto x) { return 1 / (1 + std::exp(-x)); }))},
      {"Assign", assign([](auto, auto y) { return y; })},
      {"AssignAdd", of(summed, assign([](auto x, auto y) { return x + y; }))},
      {"AssignSub", of(reduced, assign([](auto x, auto y) { return x - y; }))},
      {"AddN", of(summed, add_n)},
      {"ReduceSum", of(summed, reduction(kSum))},
      {"ReduceMean", of(floats, reduction([](const auto *row, int64_t length) { return kSum(row, length) / length; }))},
      {"ReduceMax", of(reduced, reduction([](const auto *row, int64_t n) { return *std::max_element(row, row + n); }))},
      {"ReduceMin", of(reduced, reduction([](const auto *row, int64_t n) { return *std::min_element(row, row + n); }))},
      {"BatchMatMul", of(floats, matrix("adj_x1", "adj_x2"))},
      {"BatchMatMulV2", of(floats, matrix("adj_x1", "adj_x2"))},
      {"MatMul", of(floats, matrix("transpose_x1", "transpose_x2"))},
      {"MatMulV2", of(floats, matrix("transpose_x1", "transpose_x2"))},
      {"ApplyAdam", apply_adam},
  };
}

}  // namespace sim
