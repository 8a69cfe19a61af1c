// PagedAttention: one new token of each sequence against its cached keys and values.
#include <algorithm>
#include <cstdlib>

#include "kernel.h"
#include "../operators/attention_head.h"

namespace sim {
namespace {

constexpr uint64_t CORES = 24, CORE_WORKSPACE = (16 << 20) + (256 << 10);  // of a 910B2

enum { QUERY, KEY_CACHE, VALUE_CACHE, TABLE, LENGTHS, QUANT_SCALE, QUANT_OFFSET, MASK, POSITION_BIAS, OUT };

class PagedAttention final : public InternalKernel {
 public:
  PagedAttention(const ms::InputsImmutableInfoList &inputs, const ms::OutputsImmutableInfoList &outputs,
                 const ms::PagedAttentionParam &param, const std::string &name)
      : InternalKernel(inputs, outputs, name), param_(param) {}

  ms::InternalStatus UpdateParam(const void *param) override {
    param_ = *static_cast<const ms::PagedAttentionParam *>(param);
    return ms::kInternalOk;
  }

 private:
  void describe(Op &op) const override;
  ms::PagedAttentionParam param_;
};

// The library has two kernels for it: its own, and ATB's where the environment switches its own off (vllm-mindspore
// does). Only ATB's takes the queries in two dimensions, and it takes the lengths from the host.
bool is_switched_off(const std::string &name) {
  const char *list = getenv("MS_INTERNAL_DISABLE_CUSTOM_KERNEL_LIST");
  return list != nullptr && ("," + std::string(list) + ",").find("," + name + ",") != std::string::npos;
}

// Query (batch, 1, heads · D), or (batch, heads · D) for ATB's kernel; caches (blocks, block size, key-value heads, D);
// table (batch, blocks of a sequence). The lengths are on the device and, where a graph input has their name, on the
// host as well.
void PagedAttention::describe(Op &op) const {
  op.names = {"query", "key_cache", "value_cache", "block_tables", "batch_valid_length", "antiquant_scale",
              "antiquant_offset", "attn_mask", "alibi_mask", "out"};
  op.setting("head_num", int64_t{param_.head_num});
  op.setting("kv_head_num", int64_t{param_.kv_head_num});
  op.setting("scale", double(param_.tor));
  op.setting("lengths on the host", text(Shape(param_.kv_seq_len.begin(), param_.kv_seq_len.end())).c_str());
  for (int i : {QUANT_SCALE, QUANT_OFFSET, MASK, POSITION_BIAS}) {
    op.require(!op[i], "%s is not simulated", op.names[i].c_str());
  }
  op.require(param_.q_seq_len.empty(), "several new tokens of a sequence (q_seq_lens) are not simulated");
  op.require(param_.kv_cache_quant_mode == 0 && param_.mla_v_dim == 0, "a quantised or latent cache is not simulated");
  op.types(QUERY, {FLOAT16, BFLOAT16});
  for (int i : {KEY_CACHE, VALUE_CACHE, OUT}) {
    op.require(op[i].type == op[QUERY].type, "%s must have query's dtype", op.names[i].c_str());
  }
  op.types(TABLE, {INT32});
  op.types(LENGTHS, {INT32});
  const bool atb = is_switched_off(op_name_);
  op.setting("kernel", atb ? "ATB" : "own");
  op.require(op[QUERY].rank() == 3 || atb,
             "query must be (batch, 1, heads * head_dim); (batch, heads * head_dim) is taken by ATB's kernel alone, with "
             "MS_INTERNAL_DISABLE_CUSTOM_KERNEL_LIST=PagedAttention");
  op.rank(QUERY, 2, 3);
  op.rank(KEY_CACHE, 4, 4);
  op.rank(TABLE, 2, 2);
  op.shape(VALUE_CACHE, op[KEY_CACHE].shape);
  op.shape(OUT, op[QUERY].shape);
  const Shape cache = op[KEY_CACHE].shape;
  const int64_t blocks = cache[0], block = cache[1], kv_heads = cache[2], dim = cache[3], heads = param_.head_num;
  const int64_t batch = op[TABLE].dim(0), width = op[TABLE].dim(1);
  op.require(kv_heads == param_.kv_head_num, "kv_head_num is not the cache's number of heads");
  op.require(op[QUERY].size() == batch * heads * dim && op[QUERY].dim(-1) == heads * dim,
             "query must have head_num heads of the cache's size for each row of block_tables");
  op.shape(LENGTHS, {batch});
  op.require(dim % 16 == 0, "'head_dim' must be an integer multiple of 16, but got %ld", long(dim));
  op.require(dim <= 256, "'head_dim' must be less than or equal to 256, but got %ld", long(dim));
  op.require(dim * block <= 16384, "head_dim * table_block_size > 16384 is not supported, got %ld * %ld", long(dim),
             long(block));
  op.require(block == 16 || block == 32 || block == 64 || block == 128,
             "table block size can only be in {16,32,64,128} but got %ld", long(block));
  op.require(heads % kv_heads == 0 && heads / kv_heads <= 128,
             "head_num must be a multiple of kv_head_num, at most 128 times it");
  const std::vector<int32_t> host = param_.kv_seq_len;
  op.require(host.size() == static_cast<size_t>(batch) || (host.empty() && !atb),
             "there are %zu lengths on the host for a batch of %ld: ATB's kernel needs them, and they are found by name, "
             "so the graph's input must be called batch_valid_length", host.size(), long(batch));
  // What the wheel's library asks for its own kernel (tests/simulator compares them): by the longest sequence that a row
  // of the table has room for, up to 16,384 tokens, whatever the lengths.
  const uint64_t each_token = (op[QUERY].type == BFLOAT16 ? 7 : 3) << 10;
  if (!atb) op.workspace = CORES * (CORE_WORKSPACE + std::min<int64_t>(width * block, 16384) * each_token);
  const float scale = param_.tor;
  op.run([=](const Tensors &t) {
    const auto table = read<int64_t>(t[TABLE]), lengths = read<int64_t>(t[LENGTHS]);
    const auto query = read<float>(t[QUERY]);
    std::vector<float> out(query.size()), keys, values;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t length = lengths[b];
      if (!host.empty() && length != host[b]) {
        fail("sequence %ld has length %ld on the device and %d on the host", long(b), long(length), host[b]);
      }
      if (length < 0 || length > width * block) {
        fail("sequence %ld has length %ld, its row of block_tables room for %ld", long(b), long(length),
             long(width * block));
      }
      for (int64_t head = 0; head < kv_heads; ++head) {
        keys.clear();
        values.clear();
        for (int64_t from = 0; from < length; from += block) {
          const int64_t place = table[b * width + from / block];
          if (place < 0 || place >= blocks) {
            fail("block_tables names block %ld for sequence %ld; the cache has %ld", long(place), long(b), long(blocks));
          }
          for (auto [which, to] : {std::pair{KEY_CACHE, &keys}, std::pair{VALUE_CACHE, &values}}) {
            Tensor rows = slice(slice(t[which], 0, place, 1), 2, head, 1);
            const auto part = read<float>(slice(rows, 1, 0, std::min(block, length - from)));
            to->insert(to->end(), part.begin(), part.end());
          }
        }
        const int64_t group = heads / kv_heads;
        std::vector<float> largest(group), sum(group);
        // The queries of a group see the same keys: they are the rows of one head.
        const int64_t at = (b * heads + head * group) * dim;
        if (length > 0) {
          attend(Head{group, length, dim, dim, scale, true, {}, {}, {}}, query.data() + at, keys.data(), values.data(),
                 out.data() + at, largest.data(), sum.data());
        }
      }
    }
    write(t[OUT], out);
  });
}

}  // namespace
}  // namespace sim

namespace mindspore::internal {
InternalOpPtr CreatePagedAttentionOp(const InputsImmutableInfoList &inputs, const OutputsImmutableInfoList &outputs,
                                     const PagedAttentionParam &param, const std::string &name) {
  return std::make_shared<sim::PagedAttention>(inputs, outputs, param, name);
}
}  // namespace mindspore::internal
