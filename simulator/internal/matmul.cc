// MatMul and BatchMatMul.
#include "kernel.h"
#include "../operators/gemm.h"

namespace sim {
namespace {

// out = a b, or with a or b transposed in their last two dimensions, for matrices or stacks of them.
void matmul(Op &op, bool transpose_a, bool transpose_b) {
  op.names = {"x", "weight", "out"};
  op.setting("transpose_a", transpose_a);
  op.setting("transpose_b", transpose_b);
  const Tensor &a = op[0], &b = op[1], &out = op[2];
  op.types(0, {FLOAT16, BFLOAT16});
  op.require(a.type == b.type && a.type == out.type, "the dtypes of both factors and the product must be the same");
  op.rank(0, 2, 4);
  op.rank(1, 2, 4);
  op.require(b.rank() <= a.rank(), "a weight with a batch dimension needs an input with one");
  const int64_t rows = a.dim(transpose_a ? -1 : -2), depth = a.dim(transpose_a ? -2 : -1);
  const int64_t columns = b.dim(transpose_b ? -2 : -1);
  op.require(b.dim(transpose_b ? -1 : -2) == depth, "the factors' inner dimensions differ");
  Shape stack_a(a.shape.begin(), a.shape.end() - 2), stack_b(b.shape.begin(), b.shape.end() - 2);
  Shape stack = broadcast_shapes(stack_a, stack_b);
  Shape expected = stack, whole_a = stack, whole_b = stack;
  for (auto size : {rows, columns}) expected.push_back(size);
  for (int i = 2; i >= 1; --i) {
    whole_a.push_back(a.dim(-i));
    whole_b.push_back(b.dim(-i));
  }
  op.shape(2, expected);
  op.run([=](const Tensors &t) {
    const auto x = read<float>(broadcast(t[0], whole_a)), y = read<float>(broadcast(t[1], whole_b));
    std::vector<float> products(product(expected));
    for (int64_t i = 0; i < product(stack); ++i) {
      MatrixView left{x.data() + i * rows * depth, transpose_a ? 1 : depth, transpose_a ? rows : 1};
      MatrixView right{y.data() + i * depth * columns, transpose_b ? 1 : columns, transpose_b ? depth : 1};
      gemm(rows, columns, depth, left, right, products.data() + i * rows * columns, columns);
    }
    write(t[2], products);
  });
}

}  // namespace
}  // namespace sim

namespace mindspore::internal {
InternalOpPtr CreateMatmulOp(const InputsImmutableInfoList &inputs, const OutputsImmutableInfoList &outputs,
                             const MatmulParam &param, const std::string &name) {
  const bool plain = !param.enable_dequant && !param.with_relu && !param.with_gelu && !param.with_fastgelu &&
                     !param.with_bias && !param.with_bias_fastgelu && !param.with_sigmoid_add;
  const bool a = param.transpose_a, b = param.transpose_b;
  return sim::make_internal(inputs, outputs, name, [plain, a, b](sim::Op &op) {
    op.require(plain, "only the product alone is simulated, without bias, activation or quantisation");
    sim::matmul(op, a, b);
  });
}
}  // namespace mindspore::internal
