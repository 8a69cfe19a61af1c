// AddRmsNorm, Gather, Softmax, SwiGLU and Swish.
#include <cmath>
#include <limits>

#include "kernel.h"

namespace sim {
namespace {

// total = a + b; out = total / sqrt(mean(total²) + epsilon) · weight along the last dimension. The second output of
// three, the norm's reciprocals, is for a gradient, which this kernel does not have: it is made unusable.
void add_rms_norm(Op &op, float epsilon) {
  op.setting("epsilon", double(epsilon));
  const Tensor &x = op[0];
  op.names = {"x1", "x2", "gamma", "y", "rstd", "x"};
  op.types(0, {FLOAT16, BFLOAT16, FLOAT32});
  op.require(x.type == op[1].type, "the inputs differ in dtype");
  op.require(op[2].type == x.type || op[2].type == FLOAT32, "gamma must be float32 or of the inputs' dtype");
  op.shape(1, x.shape);
  op.shape(2, {x.dim(-1)});
  op.shape(3, x.shape);
  op.shape(5, x.shape);
  op.require(op[3].type == x.type && op[5].type == x.type, "the outputs must have the inputs' dtype");
  op.run([=](const Tensors &t) {
    auto total = read<float>(t[0]);
    const auto other = read<float>(t[1]), weight = read<float>(t[2]);
    for (size_t i = 0; i < total.size(); ++i) total[i] += other[i];
    write(t[5], total);
    total = read<float>(t[5]);
    const size_t width = weight.size();
    for (size_t row = 0; row < total.size(); row += width) {
      float squares = 0;
      for (size_t i = 0; i < width; ++i) squares += total[row + i] * total[row + i];
      const float scale = 1 / std::sqrt(squares / width + epsilon);
      for (size_t i = 0; i < width; ++i) total[row + i] *= scale * weight[i];
    }
    write(t[3], total);
    write(t[4], std::vector<float>(t[4].size(), std::numeric_limits<float>::quiet_NaN()));
  });
}

// The rows of op[0] along `axis` that the indices op[1] name.
void gather(Op &op, int64_t axis, int64_t batch_dims) {
  op.names = {"input_params", "input_indices", "out"};
  op.setting("axis", axis);
  op.setting("batch_dims", batch_dims);
  const Tensor &table = op[0], &indices = op[1];
  op.types(0, {FLOAT16, BFLOAT16, FLOAT32, INT32});
  op.types(1, {INT32, INT64});
  op.require(op[2].type == table.type, "the output must have the table's dtype");
  op.require(batch_dims == 0, "only batch_dims 0 is simulated");
  if (axis < 0) axis += table.rank();
  op.require(0 <= axis && axis < table.rank(), "axis is outside the table");
  Shape expected(table.shape.begin(), table.shape.begin() + axis);
  expected.insert(expected.end(), indices.shape.begin(), indices.shape.end());
  expected.insert(expected.end(), table.shape.begin() + axis + 1, table.shape.end());
  op.shape(2, expected);
  op.run([=](const Tensors &t) {
    const auto places = read<int64_t>(t[1]);
    Tensor out = make_tensor(t[2].type, t[2].shape, t[2].data);
    Shape flat(t[0].shape.begin(), t[0].shape.begin() + axis);
    flat.push_back(places.size());
    flat.insert(flat.end(), t[0].shape.begin() + axis + 1, t[0].shape.end());
    out.shape = flat;
    out.strides = row_major(flat);
    for (size_t i = 0; i < places.size(); ++i) {
      if (places[i] < 0 || places[i] >= t[0].dim(axis)) {
        fail("index %ld is outside the table's %ld rows", long(places[i]), long(t[0].dim(axis)));
      }
      copy(slice(out, axis, i, 1), slice(t[0], axis, places[i], 1));
    }
  });
}

// Softmax of the last dimension.
void softmax(Op &op, const Shape &axes) {
  op.types(0, {FLOAT16, FLOAT32});
  op.require(axes.size() == 1 && (axes[0] == -1 || axes[0] == op[0].rank() - 1), "only the last axis is simulated");
  op.shape(1, op[0].shape);
  op.run([](const Tensors &t) {
    auto x = read<float>(t[0]);
    const size_t width = t[0].dim(-1);
    for (size_t row = 0; row < x.size(); row += width) {
      float largest = -INFINITY, sum = 0;
      for (size_t i = row; i < row + width; ++i) largest = std::max(largest, x[i]);
      for (size_t i = row; i < row + width; ++i) sum += x[i] = std::exp(x[i] - largest);
      for (size_t i = row; i < row + width; ++i) x[i] /= sum;
    }
    write(t[1], x);
  });
}

float silu(float x) { return x / (1 + std::exp(-x)); }

// silu(first half) · second half, along the last dimension.
void swiglu(Op &op, int64_t axis) {
  op.types(0, {FLOAT16, BFLOAT16, FLOAT32});
  op.require(axis == -1 || axis == op[0].rank() - 1, "only the last axis is simulated");
  Shape expected = op[0].shape;
  op.require(expected.back() % 2 == 0, "the last dimension must be even");
  expected.back() /= 2;
  op.shape(1, expected);
  op.run([=](const Tensors &t) {
    auto gate = read<float>(slice(t[0], t[0].rank() - 1, 0, expected.back()));
    const auto up = read<float>(slice(t[0], t[0].rank() - 1, expected.back(), expected.back()));
    for (size_t i = 0; i < gate.size(); ++i) gate[i] = silu(gate[i]) * up[i];
    write(t[1], gate);
  });
}

void swish(Op &op) {
  op.types(0, {FLOAT16, BFLOAT16});
  op.shape(1, op[0].shape);
  op.run([](const Tensors &t) {
    auto x = read<float>(t[0]);
    for (auto &value : x) value = silu(value);
    write(t[1], x);
  });
}

}  // namespace
}  // namespace sim

namespace mindspore::internal {
InternalOpPtr CreateAddRmsNormOp(const InputsImmutableInfoList &inputs, const OutputsImmutableInfoList &outputs,
                                 const NormParam &param, const std::string &name) {
  return sim::make_internal(inputs, outputs, name, [param](sim::Op &op) { sim::add_rms_norm(op, param.eps); });
}

InternalOpPtr CreateGatherOp(const InputsImmutableInfoList &inputs, const OutputsImmutableInfoList &outputs,
                             const GatherParam &param, const std::string &name) {
  return sim::make_internal(inputs, outputs, name,
                            [param](sim::Op &op) { sim::gather(op, param.axes.at(0), param.batch_dims); });
}

InternalOpPtr CreateSoftmaxOp(const InputsImmutableInfoList &inputs, const OutputsImmutableInfoList &outputs,
                              const SoftmaxParam &param, const std::string &name) {
  return sim::make_internal(inputs, outputs, name, [param](sim::Op &op) { sim::softmax(op, param.axes); });
}

InternalOpPtr CreateSwiGLUOp(const InputsImmutableInfoList &inputs, const OutputsImmutableInfoList &outputs,
                             const SwiGLUParam &param, const std::string &name) {
  return sim::make_internal(inputs, outputs, name, [param](sim::Op &op) { sim::swiglu(op, param.axis); });
}

InternalOpPtr CreateSwishOp(const InputsImmutableInfoList &inputs, const OutputsImmutableInfoList &outputs,
                            const std::string &name) {
  return sim::make_internal(inputs, outputs, name, sim::swish);
}
}  // namespace mindspore::internal
