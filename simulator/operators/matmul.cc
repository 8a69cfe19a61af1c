// Products of matrices. Sources: headers aclnn_{mm,addmm,matmul,batch_matmul,baddbmm}.h of CANN 8.1 and the
// documentation of ops-nn: float32, float16 and bfloat16; on a 910B products of float16 and bfloat16 add up in float32.
#include "matmul.h"

#include "gemm.h"

namespace sim {
namespace {

const std::initializer_list<DType> kFloats = {FLOAT32, FLOAT16, BFLOAT16};

// A tensor's last two axes, read as float32 in the order of its memory: a transposed view is not turned.
struct Matrices {
  std::vector<float> values;
  int64_t each;
  bool turned;
  int64_t columns;
  MatrixView at(int64_t index) const {
    const float *data = values.data() + index * each;
    return turned ? MatrixView{data, 1, columns} : MatrixView{data, columns, 1};
  }
};

Matrices matrices_of(const Tensor &tensor) {
  const int64_t rank = tensor.rank();
  const bool turned = tensor.strides[rank - 1] > tensor.strides[rank - 2];
  const Tensor view = turned ? transpose(tensor, rank - 2, rank - 1) : tensor;
  return {read<float>(view), view.shape[rank - 2] * view.shape[rank - 1], turned, view.shape[rank - 1]};
}

// A vector as a matrix of one row (or of one column), as the usual rule of matrix products has it.
Tensor as_matrix(Tensor tensor, bool row) {
  if (tensor.rank() != 1) return tensor;
  tensor.shape.insert(row ? tensor.shape.begin() : tensor.shape.end(), 1);
  tensor.strides.insert(row ? tensor.strides.begin() : tensor.strides.end(), 0);
  return tensor;
}

Shape batch_of(const Tensor &tensor) { return {tensor.shape.begin(), tensor.shape.end() - 2}; }

Shape joined(Shape batch, int64_t rows, int64_t columns) {
  batch.push_back(rows);
  batch.push_back(columns);
  return batch;
}

}  // namespace

Shape product_shape(const Op &op, const Tensor &a, const Tensor &b) {
  const Tensor left = as_matrix(a, true), right = as_matrix(b, false);
  op.require(left.rank() >= 2 && right.rank() >= 2, "a matrix product needs tensors of one axis or more");
  op.require(left.dim(-1) == right.dim(-2), "the inner axes %ld and %ld differ", left.dim(-1), right.dim(-2));
  Shape shape = broadcast_shapes(batch_of(left), batch_of(right));
  if (a.rank() > 1) shape.push_back(left.dim(-2));
  if (b.rank() > 1) shape.push_back(right.dim(-1));
  return shape;
}

std::vector<float> matrix_product(const Tensor &a, const Tensor &b) {
  Tensor left = as_matrix(a, true), right = as_matrix(b, false);
  const int64_t depth = left.dim(-1), columns = right.dim(-1);
  const Shape batch = broadcast_shapes(batch_of(left), batch_of(right));
  std::vector<float> out(product(batch) * left.dim(-2) * columns);
  if (depth == 0 || out.empty()) return out;
  if (right.rank() == 2 && left.contiguous()) {  // one matrix for all rows: one product
    left.shape = {left.size() / depth, depth};
    left.strides = {depth, 1};
  } else {
    left = broadcast(left, joined(batch, left.dim(-2), depth));
    right = broadcast(right, joined(batch, depth, columns));
  }
  const Matrices lefts = matrices_of(left), rights = matrices_of(right);
  const int64_t rows = left.dim(-2), count = out.size() / (rows * columns);
  for (int64_t i = 0; i < count; ++i) {
    gemm(rows, columns, depth, lefts.at(i), rights.at(i), out.data() + i * rows * columns, columns);
  }
  return out;
}

namespace {

int multiply(const char *name, const aclTensor *self, const aclTensor *other, const aclTensor *out, int64_t low,
             int64_t high, uint64_t *workspace, aclOpExecutor **executor) {
  return plan(name, workspace, executor, [&](Op &op) {
    const int a = op.input("self", self), b = op.input("mat2", other), c = op.output("out", out);
    for (int i : {a, b, c}) op.types(i, kFloats);
    for (int i : {a, b}) op.rank(i, low, high);
    op.require(op[a].type == op[b].type, "self and mat2 differ in dtype");
    op.shape(c, product_shape(op, op[a], op[b]));
    op.run([=](const Tensors &t) { write(t[c], matrix_product(t[a], t[b])); });
  });
}

// beta · self + alpha · (mat1 @ mat2), rounded once.
int add_product(const char *name, const aclTensor *self, const aclTensor *mat1, const aclTensor *mat2,
                const aclScalar *beta, const aclScalar *alpha, const aclTensor *out, int64_t rank, uint64_t *workspace,
                aclOpExecutor **executor) {
  return plan(name, workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), a = op.input("mat1", mat1), b = op.input("mat2", mat2);
    const int y = op.output("out", out);
    const float kept = op.number("beta", beta), factor = op.number("alpha", alpha);
    for (int i : {x, a, b, y}) op.types(i, kFloats);
    for (int i : {a, b}) op.rank(i, rank, rank);
    op.require(op[a].type == op[b].type, "mat1 and mat2 differ in dtype");
    op.shape(y, product_shape(op, op[a], op[b]));
    broadcast(op[x], op[y].shape);
    op.run([=](const Tensors &t) {
      auto values = matrix_product(t[a], t[b]);
      const auto added = read<float>(broadcast(t[x], t[y].shape));
      for (size_t i = 0; i < values.size(); ++i) values[i] = kept * added[i] + factor * values[i];
      write(t[y], values);
    });
  });
}

}  // namespace
}  // namespace sim

using namespace sim;

// cubeMathType says how the card may round float32 (HFLOAT32); here it never does.
SIM_OPERATOR(aclnnMm)
extern "C" int aclnnMmGetWorkspaceSize(const aclTensor *self, const aclTensor *other, aclTensor *out, int8_t,
                                       uint64_t *workspace, aclOpExecutor **executor) {
  return multiply("aclnnMm", self, other, out, 2, 2, workspace, executor);
}

SIM_OPERATOR(aclnnMatmul)
extern "C" int aclnnMatmulGetWorkspaceSize(const aclTensor *self, const aclTensor *other, aclTensor *out, int8_t,
                                           uint64_t *workspace, aclOpExecutor **executor) {
  return multiply("aclnnMatmul", self, other, out, 1, 6, workspace, executor);
}

SIM_OPERATOR(aclnnBatchMatMul)
extern "C" int aclnnBatchMatMulGetWorkspaceSize(const aclTensor *self, const aclTensor *other, aclTensor *out, int8_t,
                                                uint64_t *workspace, aclOpExecutor **executor) {
  return multiply("aclnnBatchMatMul", self, other, out, 3, 3, workspace, executor);
}

SIM_OPERATOR(aclnnAddmm)
extern "C" int aclnnAddmmGetWorkspaceSize(const aclTensor *self, const aclTensor *mat1, const aclTensor *mat2,
                                          const aclScalar *beta, const aclScalar *alpha, aclTensor *out, int8_t,
                                          uint64_t *workspace, aclOpExecutor **executor) {
  return add_product("aclnnAddmm", self, mat1, mat2, beta, alpha, out, 2, workspace, executor);
}

SIM_OPERATOR(aclnnInplaceAddmm)
extern "C" int aclnnInplaceAddmmGetWorkspaceSize(const aclTensor *self, const aclTensor *mat1, const aclTensor *mat2,
                                                 const aclScalar *beta, const aclScalar *alpha, int8_t,
                                                 uint64_t *workspace, aclOpExecutor **executor) {
  return add_product("aclnnInplaceAddmm", self, mat1, mat2, beta, alpha, self, 2, workspace, executor);
}

SIM_OPERATOR(aclnnBaddbmm)
extern "C" int aclnnBaddbmmGetWorkspaceSize(const aclTensor *self, const aclTensor *mat1, const aclTensor *mat2,
                                            const aclScalar *beta, const aclScalar *alpha, aclTensor *out, int8_t,
                                            uint64_t *workspace, aclOpExecutor **executor) {
  return add_product("aclnnBaddbmm", self, mat1, mat2, beta, alpha, out, 3, workspace, executor);
}
