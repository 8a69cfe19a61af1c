// FlashAttentionScore as the library's own kernel has it, for inference: without a mask, or the part before each query.
// With a mask of 8 bits MindSpore stays with aclnn's; masks of 16 bits are undocumented, and the layouts TH and TND go
// to ATB's kernel.
#include "kernel.h"
#include "../operators/attention_head.h"

namespace sim {
namespace {

enum { QUERY, KEY, VALUE, POSITION_BIAS, MASK, OUT };
using Param = ms::FlashAttentionScoreParam;

void flash_attention(Op &op, const Param &param) {
  op.names = {"query", "key", "value", "real_shift", "attn_mask", "attention_out"};
  op.setting("head_num", int64_t{param.head_num});
  op.setting("scale", double(param.tor));
  op.setting("input_layout", int64_t{param.input_layout});
  op.setting("sparse_mode", int64_t{param.sparse_mode});
  op.setting("pre_tokens", int64_t{param.pre_tokens});
  op.setting("next_tokens", int64_t{param.next_tokens});
  op.types(QUERY, {FLOAT16, BFLOAT16});
  for (int i : {KEY, VALUE, OUT}) op.require(op[i].type == op[QUERY].type, "all tensors must have query's dtype");
  op.require(param.sparse_mode == 0, "Only support sparse mode in {0}, but got %d", param.sparse_mode);
  op.require(param.input_layout != Param::TH && param.input_layout != Param::TND,
             "ATB's kernel, for the layouts TH and TND, is not simulated");
  op.require(param.input_layout == Param::BSH || param.input_layout == Param::BNSD,
             "Layout can only be BSH or BNSD, but got %d", param.input_layout);
  for (int i : {POSITION_BIAS, MASK}) op.require(!op[i], "%s is not simulated", op.names[i].c_str());
  const bool heads_apart = param.input_layout == Param::BNSD;
  for (int i : {QUERY, KEY, VALUE}) op.rank(i, heads_apart ? 4 : 3, heads_apart ? 4 : 3);
  op.shape(VALUE, op[KEY].shape);
  op.shape(OUT, op[QUERY].shape);
  const int64_t batch = op[QUERY].dim(0), heads = param.head_num, length = op[QUERY].dim(-2), keys = op[KEY].dim(-2);
  op.require(heads > 0 && (heads_apart ? op[QUERY].dim(1) == heads : op[QUERY].dim(-1) % heads == 0),
             "head_num is not query's number of heads");
  const int64_t dim = heads_apart ? op[QUERY].dim(-1) : op[QUERY].dim(-1) / heads;
  op.require(op[KEY].dim(0) == batch && op[KEY].dim(-1) % dim == 0 && (!heads_apart || op[KEY].dim(-1) == dim),
             "key must have query's batch and heads of its size");
  const int64_t kv_heads = heads_apart ? op[KEY].dim(1) : op[KEY].dim(-1) / dim;
  op.require(heads % kv_heads == 0, "query's heads must be a multiple of key's");
  op.require(dim % 16 == 0, "'head_dim' must be an integer multiple of 16, but got %ld", long(dim));
  op.require(dim <= 256, "'head_dim' must be less than or equal to 256, but got %ld", long(dim));
  op.require(keys >= length, "kv seqlen must be larger than or equal to q seqlen, but they are %ld and %ld", long(keys),
             long(length));
  const bool whole = param.pre_tokens >= length && param.next_tokens >= keys;
  const bool triangle = !whole && param.pre_tokens >= length && param.next_tokens == 0;
  op.require(whole || triangle,
             "Only support condition in {pre_tokens >= q_seqlen && next_tokens >= kv_seqlen (full matrix), pre_tokens >= "
             "q_seqlen && next_tokens == 0 (lower triangle)}");
  op.require(!triangle || dim == 64 || dim == 128 || dim == 256,
             "lower triangle mode can only support head_dim = (64, 128, 256) but got %ld", long(dim));
  op.require(!triangle || keys == length, "the lower triangle of unequal lengths is not simulated");
  Head head{length, keys, dim, dim, param.tor, false, {}, {}, {}};
  if (triangle) {
    head.hide = [=](int64_t row, uint8_t *hidden) {
      for (int64_t j = 0; j < keys; ++j) hidden[j] = j > row;
    };
  }
  op.run([=](const Tensors &t) {
    auto head_of = [&](const Tensor &x, int64_t b, int64_t h) {
      if (heads_apart) return slice(slice(x, 0, b, 1), 1, h, 1);
      return slice(slice(x, 0, b, 1), 2, h * dim, dim);
    };
    std::vector<float> out(length * dim), largest(length), sum(length);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t shared = h / (heads / kv_heads);
        attend(head, read<float>(head_of(t[QUERY], b, h)).data(), read<float>(head_of(t[KEY], b, shared)).data(),
               read<float>(head_of(t[VALUE], b, shared)).data(), out.data(), largest.data(), sum.data());
        write(head_of(t[OUT], b, h), out);
      }
    }
  });
}

struct FlashAttention final : InternalKernel {
  FlashAttention(const ms::InputsImmutableInfoList &inputs, const ms::OutputsImmutableInfoList &outputs,
                 const Param &param, const std::string &name)
      : InternalKernel(inputs, outputs, name), param(param) {}

  ms::InternalStatus UpdateParam(const void *changed) override {
    param = *static_cast<const Param *>(changed);
    return ms::kInternalOk;
  }
  void describe(Op &op) const override { flash_attention(op, param); }
  Param param;
};

}  // namespace
}  // namespace sim

namespace mindspore::internal {
InternalOpPtr CreateFlashAttentionScoreOp(const InputsImmutableInfoList &inputs,
                                          const OutputsImmutableInfoList &outputs,
                                          const FlashAttentionScoreParam &param, const std::string &name) {
  return std::make_shared<sim::FlashAttention>(inputs, outputs, param, name);
}
}  // namespace mindspore::internal
