// FlashAttentionScore and its gradient, and both for sequences in a row (layout TND). Source: see attention.cc.
#include <memory>

#include "attention.h"
#include "gemm.h"

namespace sim {
namespace {

// Calls each(sequence, key head) for all of them, in two threads where the work is worth it.
void for_each_key_head(const Attention &attention, const std::function<void(const Sequence &, int64_t)> &each) {
  double work = 0;
  for (const Sequence &s : attention.sequences) work += 4.0 * attention.heads * s.queries * s.keys * attention.dim;
  in_parallel(attention.sequences.size() * attention.key_heads, work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      each(attention.sequences[i / attention.key_heads], i % attention.key_heads);
    }
  });
}

Shape result_shape(const Op &op, const Attention &attention, bool has_heads) {
  Shape shape = op[attention.query].shape;
  shape.back() = has_heads ? attention.value_dim : attention.heads * attention.value_dim;
  return shape;
}

void write_statistics(const Tensor &to, const std::vector<float> &values) {
  Tensor column = make_tensor(FLOAT32, {int64_t(values.size()), 1}, const_cast<float *>(values.data()));
  copy(to, broadcast(column, to.shape));
}

std::vector<float> read_statistics(const Tensor &tensor) { return read<float>(slice(tensor, 1, 0, 1)); }

int score(const char *name, const AttentionCall &call, const aclTensor *largest, const aclTensor *sum,
          const aclTensor *softmax, const aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
  return plan(name, workspace, executor, [&](Op &op) {
    const auto attention = std::make_shared<const Attention>(op, call);
    const int l = op.output("softmaxMaxOut", largest), s = op.output("softmaxSumOut", sum);
    op.optional("softmaxOutOut", softmax);  // not written by the operator
    const int y = op.output("attentionOutOut", out);
    for (int i : {l, s}) op.types(i, {FLOAT32}), op.shape(i, attention->statistics_shape());
    op.types(y, {op[attention->query].type});
    op.shape(y, result_shape(op, *attention, attention->has_heads()));
    op.run([=](const Tensors &t) {
      const Attention &a = *attention;
      a.prepare(t);
      for_each_key_head(a, [&](const Sequence &sequence, int64_t key_head) {
        const auto keys = read<float>(a.rows(t[a.key], a.key_heads, sequence, key_head, true));
        const auto values = read<float>(a.rows(t[a.value], a.key_heads, sequence, key_head, true));
        const int64_t group = a.heads / a.key_heads;
        for (int64_t number = key_head * group; number < (key_head + 1) * group; ++number) {
          const auto queries = read<float>(a.rows(t[a.query], a.heads, sequence, number, false));
          std::vector<float> result(sequence.queries * a.value_dim), maxima(sequence.queries), sums(maxima);
          attend(a.head(t, sequence, number), queries.data(), keys.data(), values.data(), result.data(),
                 maxima.data(), sums.data());
          write(a.rows(t[y], a.heads, sequence, number, false), result);
          write_statistics(a.statistics(t[l], sequence, number), maxima);
          write_statistics(a.statistics(t[s], sequence, number), sums);
        }
      });
    });
  });
}

struct GradientTensors {
  const aclTensor *incoming, *largest, *sum, *softmax, *result, *query, *key, *value, *bias;
};

int gradient(const char *name, const AttentionCall &call, const GradientTensors &tensors, uint64_t *workspace,
             aclOpExecutor **executor) {
  return plan(name, workspace, executor, [&](Op &op) {
    const auto attention = std::make_shared<const Attention>(op, call);
    const int d = op.input("dy", tensors.incoming), l = op.input("softmaxMax", tensors.largest),
              s = op.input("softmaxSum", tensors.sum), y = op.input("attentionIn", tensors.result),
              dq = op.output("dqOut", tensors.query), dk = op.output("dkOut", tensors.key),
              dv = op.output("dvOut", tensors.value);
    op.optional("softmaxIn", tensors.softmax);
    op.optional("dpseOut", tensors.bias);  // the card gives none for a bias that is no parameter
    const DType type = op[attention->query].type;
    for (int i : {d, y}) op.types(i, {type}), op.shape(i, result_shape(op, *attention, attention->has_heads()));
    for (int i : {l, s}) op.types(i, {FLOAT32}), op.shape(i, attention->statistics_shape());
    for (int i : {dq, dk, dv}) op.types(i, {type});
    if (type == FLOAT32) op.types(attention->mask, {BOOL});
    op.shape(dq, op[attention->query].shape);
    op.shape(dk, op[attention->key].shape);
    op.shape(dv, op[attention->value].shape);
    op.require(!attention->is_packed() || attention->dim <= 512, "in layout TND the gradient takes heads of up to 512");
    op.run([=](const Tensors &t) {
      const Attention &a = *attention;
      a.prepare(t);
      for_each_key_head(a, [&](const Sequence &sequence, int64_t key_head) {
        const auto keys = read<float>(a.rows(t[a.key], a.key_heads, sequence, key_head, true));
        const auto values = read<float>(a.rows(t[a.value], a.key_heads, sequence, key_head, true));
        std::vector<float> key_sum(keys.size()), value_sum(values.size());
        const int64_t group = a.heads / a.key_heads;
        for (int64_t number = key_head * group; number < (key_head + 1) * group; ++number) {
          const auto queries = read<float>(a.rows(t[a.query], a.heads, sequence, number, false));
          const auto incoming = read<float>(a.rows(t[d], a.heads, sequence, number, false));
          const auto result = read<float>(a.rows(t[y], a.heads, sequence, number, false));
          const auto maxima = read_statistics(a.statistics(t[l], sequence, number));
          const auto sums = read_statistics(a.statistics(t[s], sequence, number));
          std::vector<float> query_gradient(queries.size());
          attend_gradient(a.head(t, sequence, number), queries.data(), keys.data(), values.data(), incoming.data(),
                          result.data(), maxima.data(), sums.data(), query_gradient.data(), key_sum.data(),
                          value_sum.data());
          write(a.rows(t[dq], a.heads, sequence, number, false), query_gradient);
        }
        write(a.rows(t[dk], a.key_heads, sequence, key_head, true), key_sum);
        write(a.rows(t[dv], a.key_heads, sequence, key_head, true), value_sum);
      });
    });
  });
}

}  // namespace
}  // namespace sim

using namespace sim;

SIM_OPERATOR(aclnnFlashAttentionScore)
extern "C" int aclnnFlashAttentionScoreGetWorkspaceSize(
    const aclTensor *query, const aclTensor *key, const aclTensor *value, const aclTensor *bias,
    const aclTensor *drop_mask, const aclTensor *padding_mask, const aclTensor *mask, const aclIntArray *prefix,
    double scale, double keep, int64_t before, int64_t after, int64_t heads, char *layout, int64_t inner_precise,
    int64_t sparse_mode, const aclTensor *largest, const aclTensor *sum, const aclTensor *softmax,
    const aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
  return score("aclnnFlashAttentionScore",
               {query, key, value, bias, drop_mask, padding_mask, mask, prefix, nullptr, nullptr, scale, keep, before,
                after, heads, layout, inner_precise, sparse_mode, false},
               largest, sum, softmax, out, workspace, executor);
}

SIM_OPERATOR(aclnnFlashAttentionVarLenScore)
extern "C" int aclnnFlashAttentionVarLenScoreGetWorkspaceSize(
    const aclTensor *query, const aclTensor *key, const aclTensor *value, const aclTensor *bias,
    const aclTensor *drop_mask, const aclTensor *padding_mask, const aclTensor *mask, const aclIntArray *prefix,
    const aclIntArray *query_ends, const aclIntArray *key_ends, double scale, double keep, int64_t before,
    int64_t after, int64_t heads, char *layout, int64_t inner_precise, int64_t sparse_mode, const aclTensor *largest,
    const aclTensor *sum, const aclTensor *softmax, const aclTensor *out, uint64_t *workspace,
    aclOpExecutor **executor) {
  return score("aclnnFlashAttentionVarLenScore",
               {query, key, value, bias, drop_mask, padding_mask, mask, prefix, query_ends, key_ends, scale, keep,
                before, after, heads, layout, inner_precise, sparse_mode, true},
               largest, sum, softmax, out, workspace, executor);
}

SIM_OPERATOR(aclnnFlashAttentionScoreGrad)
extern "C" int aclnnFlashAttentionScoreGradGetWorkspaceSize(
    const aclTensor *query, const aclTensor *key, const aclTensor *value, const aclTensor *incoming,
    const aclTensor *bias, const aclTensor *drop_mask, const aclTensor *padding_mask, const aclTensor *mask,
    const aclTensor *largest, const aclTensor *sum, const aclTensor *softmax, const aclTensor *result,
    const aclIntArray *prefix, double scale, double keep, int64_t before, int64_t after, int64_t heads, char *layout,
    int64_t inner_precise, int64_t sparse_mode, const aclTensor *dq, const aclTensor *dk, const aclTensor *dv,
    const aclTensor *dpse, uint64_t *workspace, aclOpExecutor **executor) {
  return gradient("aclnnFlashAttentionScoreGrad",
                  {query, key, value, bias, drop_mask, padding_mask, mask, prefix, nullptr, nullptr, scale, keep,
                   before, after, heads, layout, inner_precise, sparse_mode, false},
                  {incoming, largest, sum, softmax, result, dq, dk, dv, dpse}, workspace, executor);
}

SIM_OPERATOR(aclnnFlashAttentionUnpaddingScoreGrad)
extern "C" int aclnnFlashAttentionUnpaddingScoreGradGetWorkspaceSize(
    const aclTensor *query, const aclTensor *key, const aclTensor *value, const aclTensor *incoming,
    const aclTensor *bias, const aclTensor *drop_mask, const aclTensor *padding_mask, const aclTensor *mask,
    const aclTensor *largest, const aclTensor *sum, const aclTensor *softmax, const aclTensor *result,
    const aclIntArray *prefix, const aclIntArray *query_ends, const aclIntArray *key_ends, double scale, double keep,
    int64_t before, int64_t after, int64_t heads, char *layout, int64_t inner_precise, int64_t sparse_mode,
    const aclTensor *dq, const aclTensor *dk, const aclTensor *dv, const aclTensor *dpse, uint64_t *workspace,
    aclOpExecutor **executor) {
  return gradient("aclnnFlashAttentionUnpaddingScoreGrad",
                  {query, key, value, bias, drop_mask, padding_mask, mask, prefix, query_ends, key_ends, scale, keep,
                   before, after, heads, layout, inner_precise, sparse_mode, true},
                  {incoming, largest, sum, softmax, result, dq, dk, dv, dpse}, workspace, executor);
}
