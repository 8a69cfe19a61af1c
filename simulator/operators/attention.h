// The shared part of the operators of FlashAttention: what layouts, masks, biases and dropout mean.
#pragma once

#include "../sim.h"
#include "attention_head.h"

namespace sim {

// The arguments that all of them have, as aclnn's prototypes name them.
struct AttentionCall {
  const aclTensor *query, *key, *value, *bias, *drop_mask, *padding_mask, *mask;
  const aclIntArray *prefix, *query_ends, *key_ends;
  double scale, keep;
  int64_t before, after, heads;
  const char *layout;
  int64_t inner_precise, sparse_mode;
  bool is_packed;  // sequences in a row, by their ends: layout TND and no other
};

// One sequence among the rows of the tensors.
struct Sequence {
  int64_t index;                   // the batch, in layouts that have one
  int64_t query_begin, queries;    // rows of query (0 where the batch is an axis)
  int64_t key_begin, keys;
  int64_t score_begin;             // elements of (heads, queries, keys) before it: where its dropout bits start
};

class Attention {
 public:
  Attention(Op &op, const AttentionCall &call);  // names the tensors and refuses what CANN refuses

  int query, key, value, bias, drop_mask, mask;
  int64_t heads, key_heads, dim, value_dim;
  std::vector<Sequence> sequences;
  bool is_packed() const { return layout == "TND"; }
  bool has_heads() const { return layout.back() == 'D'; }  // as an axis of its own
  Shape statistics_shape() const;  // of the softmax's largest scores and sums: (B, heads, S, 8), in TND (T, heads, 8)

  // The rows of one head of one sequence, of a tensor in the call's layout with `of` heads: (rows, D).
  Tensor rows(const Tensor &tensor, int64_t of, const Sequence &sequence, int64_t head, bool of_keys) const;
  Tensor statistics(const Tensor &tensor, const Sequence &sequence, int64_t head) const;  // (queries, 8)

  // What the masks, the bias and the dropout bits say of a head.
  void prepare(const Tensors &tensors) const;  // refuses a compressed mask that is not the triangle it must be
  Head head(const Tensors &tensors, const Sequence &sequence, int64_t number) const;

 private:
  void check_layout(Op &op, const AttentionCall &call);
  void check_mask(const Op &op) const;
  void check_bias(const Op &op) const;
  void check_dropout(const Op &op) const;
  std::string layout;
  float scale, keep;
  int64_t before, after, sparse_mode, inner_precise;
};

}  // namespace sim
