// Products with weights of 8 or 4 bits. Source: the documentation of aclnnWeightQuantBatchMatmulV2 in ops-nn, for the
// products of the 910B, and the dtypes of ops_910b_cann81.json: y = x @ ((weight + offset) · scale) + bias.
#include "gemm.h"
#include "sim.h"

namespace sim {
namespace {

constexpr int64_t LARGEST = 65535, GROUP = 32;  // of k and n; what a group's size is a multiple of

bool turned(const Tensor &t) { return t.strides[0] == 1 && t.strides[1] == t.shape[0]; }

// Element (i, j) of a weight of int8, or of int4: two in a byte, the lower four bits first along the memory.
int number(const Tensor &weight, int64_t i, int64_t j) {
  const int64_t place = weight.offset + i * weight.strides[0] + j * weight.strides[1];
  if (weight.type == INT8) return static_cast<const int8_t *>(weight.data)[place];
  const int bits = static_cast<const uint8_t *>(weight.data)[place / 2] >> (place % 2 * 4) & 15;
  return bits < 8 ? bits : bits - 16;
}

// float32 (k, n), each element rounded to x's dtype, in which it is multiplied.
std::vector<float> dequantised(const Tensor &weight, const Tensor &scale, const Tensor &offset, int64_t group, DType type) {
  const int64_t k = weight.shape[0], n = weight.shape[1], groups = group == 0 ? 1 : (k + group - 1) / group;
  const std::vector<float> scales = read<float>(broadcast(scale, {groups, n}));
  const std::vector<float> offsets = offset ? read<float>(broadcast(offset, {groups, n})) : std::vector<float>(groups * n);
  std::vector<float> values(k * n);
  in_parallel(k, 10.0 * k * n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0, g = group == 0 ? 0 : i / group; j < n; ++j) {
        const float value = (number(weight, i, j) + offsets[g * n + j]) * scales[g * n + j];
        values[i * n + j] = type == BFLOAT16 ? float(bfloat16(value)) : float(float16(value));
      }
  });
  return values;
}

void check_per_output(const Op &op, int tensor, const char *what, int64_t n) {
  const Tensor &t = op[tensor];
  op.require(!t || t.shape == Shape{n} || t.shape == Shape{1, n}, "%s has shape %s, must have (%ld) or (1,%ld)", what,
             text(t.shape).c_str(), long(n), long(n));
}

}  // namespace
}  // namespace sim

using namespace sim;

SIM_OPERATOR(aclnnWeightQuantBatchMatmulV2)
extern "C" int aclnnWeightQuantBatchMatmulV2GetWorkspaceSize(
    const aclTensor *x, const aclTensor *weight, const aclTensor *scale, const aclTensor *offset, const aclTensor *quant_scale,
    const aclTensor *quant_offset, const aclTensor *bias, int group_size, const aclTensor *y, uint64_t *workspace,
    aclOpExecutor **executor) {
  return plan("aclnnWeightQuantBatchMatmulV2", workspace, executor, [&](Op &op) {
    const int a = op.input("x", x), w = op.input("weight", weight), s = op.input("antiquantScale", scale);
    const int o = op.optional("antiquantOffset", offset), b = op.optional("bias", bias), c = op.output("y", y);
    const int64_t group = op.setting("antiquantGroupSize", int64_t(group_size));
    op.require(quant_scale == nullptr && quant_offset == nullptr, "results of 8 bits (quantScale) are not simulated");
    op.types(a, {FLOAT16, BFLOAT16});
    op.require(op[w].type != INT32, "weights of int32, which aclnnConvertWeightToINT4Pack makes, are not simulated");
    op.types(w, {INT8, INT4});
    for (int i : {a, w, c}) op.rank(i, 2, 2);
    for (int i : {a, w})
      op.require(op[i].contiguous() || turned(op[i]), "x and weight must lie in their order, or transposed");
    const int64_t m = op[a].shape[0], k = op[a].shape[1], n = op[w].shape[1];
    op.require(op[w].shape[0] == k, "the inner axes %ld and %ld differ", long(k), long(op[w].shape[0]));
    op.require(m >= 1 && k >= 1 && n >= 1 && k <= LARGEST && n <= LARGEST, "k and n must be from 1 to %ld", long(LARGEST));
    op.require(op[w].format == 2, "a weight in another format than ND is not simulated");
    op.require(op[w].type != INT4 || (op[w].contiguous() ? n : k) % 2 == 0, "of int4 the inner axis must be even");
    op.require(group == 0 || (group % GROUP == 0 && group >= GROUP && group < k),
               "antiquantGroupSize must be 0, or a multiple of %ld up to k - 1", long(GROUP));
    op.types(s, {op[a].type});
    if (group == 0) {
      if (op[s].shape != Shape{1} && op[s].shape != Shape{1, 1}) check_per_output(op, s, "antiquantScale", n);
    } else {
      op.shape(s, {(k + group - 1) / group, n});
    }
    op.types(o, {op[a].type});
    op.shape(o, op[s].shape);
    op.types(b, {op[a].type == BFLOAT16 ? FLOAT32 : FLOAT16});
    check_per_output(op, b, "bias", n);
    op.types(c, {op[a].type});
    op.shape(c, {m, n});
    op.run([=](const Tensors &t) {
      const std::vector<float> rows = read<float>(t[a]), matrix = dequantised(t[w], t[s], t[o], group, t[a].type);
      std::vector<float> result(m * n);
      gemm(m, n, k, {rows.data(), k, 1}, {matrix.data(), n, 1}, result.data(), n);
      if (t[b]) {
        const std::vector<float> added = read<float>(broadcast(t[b], {m, n}));
        for (int64_t i = 0; i < m * n; ++i) result[i] += added[i];
      }
      write(t[c], result);
    });
  });
}
