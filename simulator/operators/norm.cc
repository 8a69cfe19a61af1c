// RmsNorm and AddRmsNorm, and SwiGlu, with their gradients.
// Sources: headers aclnn_{rms_norm,rms_norm_grad,add_rms_norm,swi_glu,swi_glu_grad}.h of CANN 8.1, documentation of
// ops-nn, ops_910b_cann81.json. Computed in float32, rounded once.
#include <cmath>
#include <algorithm>

#include "gemm.h"
#include "../sim.h"

namespace sim {
namespace {

const std::initializer_list<DType> kFloats = {FLOAT32, FLOAT16, BFLOAT16};

// Rows of `length`: the axes that gamma has, from the end of x.
struct Rows {
  int64_t count, length;
};

Rows rows_of(const Op &op, int x, int gamma) {
  const Shape &shape = op[x].shape, &scale = op[gamma].shape;
  op.require(!scale.empty() && scale.size() <= shape.size() &&
                 std::equal(scale.rbegin(), scale.rend(), shape.rbegin()),
             "gamma must have the shape of x's last axes");
  const int64_t length = product(scale);
  return {length ? product(shape) / length : 0, length};
}

// Of one reciprocal root mean square a row: x's shape with the normalised axes 1.
Shape rstd_shape(const Op &op, int x, int gamma) {
  Shape shape = op[x].shape;
  std::fill(shape.end() - op[gamma].rank(), shape.end(), 1);
  return shape;
}

void require_types_of_norm(const Op &op, int x, int gamma) {
  op.types(x, kFloats);
  op.types(gamma, kFloats);
  op.require(op[gamma].type == op[x].type || op[gamma].type == FLOAT32, "gamma must be float32 or of x's dtype");
}

// values become normalised and scaled; gives the reciprocal root mean squares.
std::vector<float> normalise(std::vector<float> &values, const std::vector<float> &gamma, Rows rows, double epsilon) {
  std::vector<float> rstd(rows.count);
  in_parallel(rows.count, 4.0 * values.size(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float *row = values.data() + i * rows.length;
      float squares = 0;
      for (int64_t j = 0; j < rows.length; ++j) squares += row[j] * row[j];
      rstd[i] = 1 / std::sqrt(squares / rows.length + static_cast<float>(epsilon));
      for (int64_t j = 0; j < rows.length; ++j) row[j] = row[j] * rstd[i] * gamma[j];
    }
  });
  return rstd;
}

}  // namespace
}  // namespace sim

using namespace sim;

SIM_OPERATOR(aclnnRmsNorm)
extern "C" int aclnnRmsNormGetWorkspaceSize(const aclTensor *x, const aclTensor *gamma, double epsilon,
                                            const aclTensor *out, const aclTensor *rstd, uint64_t *workspace,
                                            aclOpExecutor **executor) {
  return plan("aclnnRmsNorm", workspace, executor, [&](Op &op) {
    const int a = op.input("x", x), g = op.input("gamma", gamma), y = op.output("yOut", out),
              r = op.output("rstdOut", rstd);
    op.setting("epsilon", epsilon);
    require_types_of_norm(op, a, g);
    const Rows rows = rows_of(op, a, g);
    op.types(y, {op[a].type});
    op.types(r, {FLOAT32});
    op.shape(y, op[a].shape);
    op.shape(r, rstd_shape(op, a, g));
    op.run([=](const Tensors &t) {
      auto values = read<float>(t[a]);
      write(t[r], normalise(values, read<float>(t[g]), rows, epsilon));
      write(t[y], values);
    });
  });
}

SIM_OPERATOR(aclnnAddRmsNorm)
extern "C" int aclnnAddRmsNormGetWorkspaceSize(const aclTensor *x1, const aclTensor *x2, const aclTensor *gamma,
                                               double epsilon, const aclTensor *out, const aclTensor *rstd,
                                               const aclTensor *sum, uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnAddRmsNorm", workspace, executor, [&](Op &op) {
    const int a = op.input("x1", x1), b = op.input("x2", x2), g = op.input("gamma", gamma),
              y = op.output("yOut", out), r = op.output("rstdOut", rstd), s = op.output("xOut", sum);
    op.setting("epsilon", epsilon);
    op.types(a, kFloats);
    for (int i : {b, g, y, s}) op.types(i, {op[a].type});
    op.types(r, {FLOAT32});
    const Rows rows = rows_of(op, a, g);
    for (int i : {b, y, s}) op.shape(i, op[a].shape);
    op.shape(r, rstd_shape(op, a, g));
    op.run([=](const Tensors &t) {
      auto values = read<float>(t[a]);
      const auto added = read<float>(t[b]);
      for (size_t i = 0; i < values.size(); ++i) values[i] += added[i];
      write(t[s], values);
      write(t[r], normalise(values, read<float>(t[g]), rows, epsilon));
      write(t[y], values);
    });
  });
}

SIM_OPERATOR(aclnnRmsNormGrad)
extern "C" int aclnnRmsNormGradGetWorkspaceSize(const aclTensor *gradient, const aclTensor *x, const aclTensor *rstd,
                                                const aclTensor *gamma, const aclTensor *x_gradient,
                                                const aclTensor *gamma_gradient, uint64_t *workspace,
                                                aclOpExecutor **executor) {
  return plan("aclnnRmsNormGrad", workspace, executor, [&](Op &op) {
    const int d = op.input("dy", gradient), a = op.input("x", x), r = op.input("rstd", rstd),
              g = op.input("gamma", gamma), dx = op.output("dxOut", x_gradient),
              dg = op.output("dgammaOut", gamma_gradient);
    require_types_of_norm(op, a, g);
    for (int i : {d, dx}) op.types(i, {op[a].type}), op.shape(i, op[a].shape);
    for (int i : {r, dg}) op.types(i, {FLOAT32});
    const Rows rows = rows_of(op, a, g);
    op.shape(dg, op[g].shape);
    op.require(op[r].size() == rows.count, "rstd has %ld elements for %ld rows", op[r].size(), rows.count);
    op.run([=](const Tensors &t) {
      const auto values = read<float>(t[a]), scale = read<float>(t[g]), rstds = read<float>(t[r]);
      auto incoming = read<float>(t[d]);
      std::vector<float> gamma_sum(rows.length);
      for (int64_t i = 0; i < rows.count; ++i) {
        const float *row = values.data() + i * rows.length;
        float *dy = incoming.data() + i * rows.length;
        float mean = 0;
        for (int64_t j = 0; j < rows.length; ++j) {
          const float normed = row[j] * rstds[i];
          gamma_sum[j] += dy[j] * normed;
          mean += dy[j] * scale[j] * normed;
        }
        mean /= rows.length;
        for (int64_t j = 0; j < rows.length; ++j) {
          dy[j] = (dy[j] * scale[j] - row[j] * rstds[i] * mean) * rstds[i];
        }
      }
      write(t[dx], incoming);
      write(t[dg], gamma_sum);
    });
  });
}

namespace {

// The axis that holds gate and up side by side; the shape of one of them is `half`.
int64_t swiglu_axis(Op &op, int x, int64_t dim, Shape *half) {
  const int64_t rank = op[x].rank();
  op.setting("dim", dim);
  op.require(dim >= -rank && dim < rank, "dim %ld is outside the tensor's %ld axes", dim, rank);
  const int64_t axis = dim < 0 ? dim + rank : dim;
  op.require(op[x].shape[axis] % 2 == 0, "axis %ld of %ld cannot be halved", axis, op[x].shape[axis]);
  *half = op[x].shape;
  (*half)[axis] /= 2;
  return axis;
}

Tensor first_half(const Tensor &t, int64_t axis) { return slice(t, axis, 0, t.shape[axis] / 2); }
Tensor second_half(const Tensor &t, int64_t axis) { return slice(t, axis, t.shape[axis] / 2, t.shape[axis] / 2); }

}  // namespace

SIM_OPERATOR(aclnnSwiGlu)
extern "C" int aclnnSwiGluGetWorkspaceSize(const aclTensor *x, int64_t dim, const aclTensor *out, uint64_t *workspace,
                                           aclOpExecutor **executor) {
  return plan("aclnnSwiGlu", workspace, executor, [&](Op &op) {
    const int a = op.input("x", x), y = op.output("out", out);
    op.types(a, kFloats);
    op.types(y, {op[a].type});
    Shape half;
    const int64_t axis = swiglu_axis(op, a, dim, &half);
    op.shape(y, half);
    op.run([=](const Tensors &t) {
      auto gate = read<float>(first_half(t[a], axis));
      const auto up = read<float>(second_half(t[a], axis));
      for (size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
      write(t[y], gate);
    });
  });
}

SIM_OPERATOR(aclnnSwiGluGrad)
extern "C" int aclnnSwiGluGradGetWorkspaceSize(const aclTensor *gradient, const aclTensor *x, int64_t dim,
                                               const aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnSwiGluGrad", workspace, executor, [&](Op &op) {
    const int d = op.input("yGrad", gradient), a = op.input("x", x), dx = op.output("out", out);
    op.types(a, kFloats);
    for (int i : {d, dx}) op.types(i, {op[a].type});
    Shape half;
    const int64_t axis = swiglu_axis(op, a, dim, &half);
    op.shape(d, half);
    op.shape(dx, op[a].shape);
    op.run([=](const Tensors &t) {
      auto gate = read<float>(first_half(t[a], axis)), up = read<float>(second_half(t[a], axis));
      const auto dy = read<float>(t[d]);
      for (size_t i = 0; i < gate.size(); ++i) {
        const float open = 1 / (1 + std::exp(-gate[i])), silu = gate[i] * open;
        gate[i] = dy[i] * up[i] * open * (1 + gate[i] * (1 - open));
        up[i] = dy[i] * silu;
      }
      write(first_half(t[dx], axis), gate);
      write(second_half(t[dx], axis), up);
    });
  });
}
