// Source: documentation of aclnnFlashAttention{Score,VarLenScore,ScoreGrad,UnpaddingScoreGrad} of ops-transformer,
// among it "sparse_mode", their headers in CANN 8.1 and ops_910b_cann81.json.
#include "attention.h"

#include <algorithm>

namespace sim {
namespace {

constexpr int64_t kMostHeads = 256, kLargestHead = 768, kMostSequences = 2048;
constexpr int64_t kTriangle = 2048;   // rows and columns of the causal mask that all lengths share
constexpr int64_t kBiasRows = 1024;   // of ALiBi's bias, the last ones, given for all rows of a longer sequence
enum SparseMode { AS_MASKED = 0, ALL_MASK = 1, UPPER_LEFT = 2, LOWER_RIGHT = 3, BAND = 4 };

bool is_compressed(int64_t mode) { return mode == UPPER_LEFT || mode == LOWER_RIGHT || mode == BAND; }

}  // namespace

Attention::Attention(Op &op, const AttentionCall &call) {
  query = op.input("query", call.query);
  key = op.input("key", call.key);
  value = op.input("value", call.value);
  bias = op.optional("realShift", call.bias);
  drop_mask = op.optional("dropMask", call.drop_mask);
  const int padding = op.optional("paddingMask", call.padding_mask);
  mask = op.optional("attenMask", call.mask);
  const Shape prefix = op.setting("prefix", call.prefix);
  scale = op.setting("scaleValue", call.scale);
  keep = op.setting("keepProb", call.keep);
  before = op.setting("preTokens", call.before);
  after = op.setting("nextTokens", call.after);
  heads = op.setting("headNum", call.heads);
  layout = op.setting("inputLayout", call.layout);
  inner_precise = op.setting("innerPrecise", call.inner_precise);
  sparse_mode = op.setting("sparseMode", call.sparse_mode);
  op.types(query, {FLOAT16, BFLOAT16, FLOAT32});
  for (int i : {key, value}) op.types(i, {op[query].type});
  op.require(!op[padding], "paddingMask is not used by the operator and must be absent");
  op.require(prefix.empty() && sparse_mode <= BAND, "prefix and sparse modes above 4 are not simulated");
  op.require(sparse_mode >= 0, "sparseMode must be 0 to 8, not %ld", sparse_mode);
  check_layout(op, call);
  check_mask(op);
  check_bias(op);
  check_dropout(op);
}

void Attention::check_layout(Op &op, const AttentionCall &call) {
  const Tensor &q = op[query], &k = op[key], &v = op[value];
  const char *allowed = call.is_packed ? " TND " : " BSH SBH BSND BNSD ";
  op.require(std::string(allowed).find(" " + layout + " ") != std::string::npos, "inputLayout must be one of%snot %s",
             allowed, layout.c_str());
  for (int i : {query, key, value}) op.rank(i, layout.size(), layout.size());
  op.require(heads > 0 && heads <= kMostHeads, "headNum must be 1 to %ld, not %ld", kMostHeads, heads);
  if (has_heads()) {
    const int64_t axis = layout.find('N');
    dim = q.dim(-1), value_dim = v.dim(-1), key_heads = k.shape[axis];
    op.require(q.shape[axis] == heads, "headNum is %ld, but query has %ld heads", heads, q.shape[axis]);
    op.require(v.shape[axis] == key_heads, "key has %ld heads, value %ld", key_heads, v.shape[axis]);
  } else {
    op.require(q.dim(-1) % heads == 0, "query's %ld columns are no %ld heads", q.dim(-1), heads);
    dim = q.dim(-1) / heads;
    op.require(dim > 0 && k.dim(-1) % dim == 0, "key's %ld columns are no heads of %ld", k.dim(-1), dim);
    key_heads = k.dim(-1) / dim;
    op.require(key_heads > 0 && v.dim(-1) % key_heads == 0, "value's %ld columns are no %ld heads", v.dim(-1),
               key_heads);
    value_dim = v.dim(-1) / key_heads;
  }
  op.require(dim > 0 && dim <= kLargestHead, "heads must have 1 to %ld columns, not %ld", kLargestHead, dim);
  op.require(!has_heads() || k.dim(-1) == dim, "query's heads have %ld columns, key's %ld", dim, k.dim(-1));
  op.require(value_dim <= dim, "value's heads have %ld columns, more than key's %ld", value_dim, dim);
  op.require(key_heads > 0 && heads % key_heads == 0, "query's %ld heads are no multiple of key's %ld", heads,
             key_heads);
  if (is_packed()) {
    const Shape ends = op.setting("actualSeqQLen", call.query_ends);
    const Shape key_ends = op.setting("actualSeqKvLen", call.key_ends);
    op.require(!ends.empty() && ends.size() == key_ends.size(),
               "layout TND needs actualSeqQLen and actualSeqKvLen of the same length");
    op.require(int64_t(ends.size()) <= kMostSequences, "at most %ld sequences, not %zu", kMostSequences, ends.size());
    Sequence sequence{0, 0, 0, 0, 0, 0};
    for (size_t i = 0; i < ends.size(); ++i) {
      sequence.queries = ends[i] - sequence.query_begin;
      sequence.keys = key_ends[i] - sequence.key_begin;
      op.require(sequence.queries >= 0 && sequence.keys >= 0, "the sequences' ends must not fall");
      op.require(sparse_mode != LOWER_RIGHT || sequence.queries <= sequence.keys,
                 "in sparse mode 3 sequence %zu has %ld queries for %ld keys", i, sequence.queries, sequence.keys);
      sequences.push_back(sequence);
      sequence.score_begin += heads * sequence.queries * sequence.keys;
      sequence.query_begin = ends[i];
      sequence.key_begin = key_ends[i];
    }
    op.require(ends.back() == q.shape[0] && key_ends.back() == k.shape[0] && v.shape[0] == k.shape[0],
               "the sequences end at %ld and %ld, but query has %ld rows, key %ld and value %ld", ends.back(),
               key_ends.back(), q.shape[0], k.shape[0], v.shape[0]);
  } else {
    const int64_t batch_axis = layout.find('B'), row_axis = layout.find('S'), batch = q.shape[batch_axis];
    const int64_t queries = q.shape[row_axis], keys = k.shape[row_axis];
    for (int i : {key, value}) {
      op.require(op[i].shape[batch_axis] == batch, "%s's batch is not query's %ld", op.names[i].c_str(), batch);
      op.require(op[i].shape[row_axis] == keys, "key and value differ in length");
    }
    for (int64_t i = 0; i < batch; ++i) {
      sequences.push_back({i, 0, queries, 0, keys, i * heads * queries * keys});
    }
  }
}

void Attention::check_mask(const Op &op) const {
  op.types(mask, {BOOL, UINT8});
  if (is_compressed(sparse_mode)) {
    op.require(bool(op[mask]), "sparse mode %ld needs attenMask", sparse_mode);
    op.shape(mask, {kTriangle, kTriangle});
    return;
  }
  op.require(op[mask] || sparse_mode != ALL_MASK, "sparse mode 1 needs attenMask");
  if (!op[mask]) return;
  const Shape &shape = op[mask].shape;
  for (const Sequence &sequence : sequences) {
    const bool matrix = shape == Shape{sequence.queries, sequence.keys};
    const bool each = shape.size() == 4 && (shape[0] == 1 || shape[0] == int64_t(sequences.size())) &&
                      (shape[1] == 1 || shape[1] == heads) && !(shape[0] == 1 && shape[1] != 1) &&
                      shape[2] == sequence.queries && shape[3] == sequence.keys;
    op.require(matrix || (each && !is_packed()),
               "attenMask must be (Sq, Skv), (1,1,Sq,Skv), (B,1,Sq,Skv) or (B,N,Sq,Skv) with Sq %ld and Skv %ld",
               sequence.queries, sequence.keys);
  }
}

void Attention::check_bias(const Op &op) const {
  op.types(bias, {op[query].type});
  if (!op[bias]) return;
  op.require(!is_packed(), "realShift in layout TND is not simulated");
  const Shape &shape = op[bias].shape;
  const int64_t queries = sequences.empty() ? 0 : sequences[0].queries;
  const int64_t keys = sequences.empty() ? 0 : sequences[0].keys;
  const int64_t batch = sequences.size();
  const bool fits = shape.size() == 4 && (shape[0] == 1 || shape[0] == batch) && shape[1] == heads && shape[3] == keys;
  const bool whole = fits && (shape[2] == queries || (shape[2] == 1 && shape[0] == batch));
  const bool last_rows = fits && shape[2] == kBiasRows && queries > kBiasRows;
  op.require(whole || last_rows, "realShift must be (B or 1,N,Sq,Skv), (B,N,1,Skv) or, of a longer causal sequence, "
                                 "its last rows (B or 1,N,1024,Skv), with Sq %ld and Skv %ld", queries, keys);
  op.require(!last_rows || (queries == keys && (sparse_mode == UPPER_LEFT || sparse_mode == LOWER_RIGHT)),
             "realShift's last %ld rows stand for all only in a causal mode (2 or 3) with Sq = Skv", kBiasRows);
}

void Attention::check_dropout(const Op &op) const {
  op.types(drop_mask, {UINT8});
  op.require(keep > 0 && keep <= 1, "keepProb must be above 0 and at most 1, not %g", keep);
  op.require(op[drop_mask] || keep == 1, "keepProb %g needs dropMask", keep);
  if (!op[drop_mask]) return;
  int64_t scores = 0;
  for (const Sequence &sequence : sequences) scores += heads * sequence.queries * sequence.keys;
  op.require(op[drop_mask].contiguous(), "dropMask with gaps is not simulated");
  op.require(op[drop_mask].size() * 8 >= scores, "dropMask has %ld bytes, a bit for each of %ld scores is needed",
             op[drop_mask].size(), scores);
}

Shape Attention::statistics_shape() const {
  if (is_packed()) return {sequences.back().query_begin + sequences.back().queries, heads, 8};
  return {int64_t(sequences.size()), heads, sequences.empty() ? 0 : sequences[0].queries, 8};
}

Tensor Attention::rows(const Tensor &tensor, int64_t of, const Sequence &sequence, int64_t head, bool of_keys) const {
  const int64_t batch_axis = layout.find('B'), row_axis = layout.find(is_packed() ? 'T' : 'S');
  Tensor view = tensor;
  if (!has_heads()) {  // (…, H): the heads are side by side
    const int64_t columns = tensor.dim(-1) / of;
    view = slice(view, 2, head * columns, columns);
  } else {
    view = slice(view, layout.find('N'), head, 1);
  }
  if (is_packed()) {
    view = slice(view, 0, of_keys ? sequence.key_begin : sequence.query_begin,
                 of_keys ? sequence.keys : sequence.queries);
  } else {
    view = slice(view, batch_axis, sequence.index, 1);
  }
  view.shape = {view.shape[row_axis], view.dim(-1)};
  view.strides = {view.strides[row_axis], view.strides.back()};
  return view;
}

Tensor Attention::statistics(const Tensor &tensor, const Sequence &sequence, int64_t head) const {
  Tensor view = slice(tensor, 1, head, 1);
  view = is_packed() ? slice(view, 0, sequence.query_begin, sequence.queries) : slice(view, 0, sequence.index, 1);
  const int64_t axis = is_packed() ? 0 : 2;
  view.shape = {view.shape[axis], 8};
  view.strides = {view.strides[axis], view.strides.back()};
  return view;
}

void Attention::prepare(const Tensors &t) const {
  if (!is_compressed(sparse_mode)) return;
  const auto values = read<int64_t>(t[mask]);
  for (int64_t i = 0; i < kTriangle * kTriangle; ++i) {
    const bool hidden = i % kTriangle > i / kTriangle;
    if (bool(values[i]) != hidden) {
      fail("attenMask of sparse mode %ld must hide what is above its diagonal and nothing else; "
           "it has %ld at (%ld,%ld)", sparse_mode, values[i], i / kTriangle, i % kTriangle);
    }
  }
}

Head Attention::head(const Tensors &t, const Sequence &sequence, int64_t number) const {
  Head result{sequence.queries, sequence.keys, dim, value_dim, scale,
              inner_precise == 2 || (sparse_mode == LOWER_RIGHT && sequence.queries > sequence.keys), {}, {}, {}};
  const int64_t keys = sequence.keys, shift = sparse_mode == UPPER_LEFT ? 0 : keys - sequence.queries;
  if (is_compressed(sparse_mode)) {
    const int64_t low = sparse_mode == BAND ? before : keys + sequence.queries, high = sparse_mode == BAND ? after : 0;
    result.hide = [=](int64_t row, uint8_t *hidden) {
      for (int64_t j = 0; j < keys; ++j) hidden[j] = j - (row + shift) > high || (row + shift) - j > low;
    };
  } else if (t[mask]) {
    Tensor view = broadcast(t[mask], {int64_t(sequences.size()), heads, sequence.queries, keys});
    view = slice(slice(view, 0, sequence.index, 1), 1, number, 1);
    const int64_t low = sparse_mode == ALL_MASK ? INT64_MAX : before;
    const int64_t high = sparse_mode == ALL_MASK ? INT64_MAX : after;
    result.hide = [=](int64_t row, uint8_t *hidden) {
      const uint8_t *from = static_cast<const uint8_t *>(view.data) + view.offset + row * view.strides[2];
      for (int64_t j = 0; j < keys; ++j) hidden[j] = from[j * view.strides[3]] || j - row > high || row - j > low;
    };
  }
  if (t[bias]) {
    const int64_t given = t[bias].shape[2];
    Tensor view = slice(t[bias], 0, t[bias].shape[0] == 1 ? 0 : sequence.index, 1);
    view = slice(view, 1, number, 1);
    const int64_t first = sequence.queries - given;  // the query of the first row given
    result.bias = [=](int64_t row, float *to) {
      // A row above those given is one of them, moved along the diagonal: ALiBi depends on the distance alone.
      const int64_t moved = given == 1 ? 0 : (std::max<int64_t>(0, first - row) + given - 1) / given * given;
      const int64_t at = given == 1 ? 0 : row + moved - first, count = keys - moved;
      const auto values = read<float>(slice(slice(view, 2, at, 1), 3, moved, count));
      std::copy(values.begin(), values.end(), to);
      std::fill(to + count, to + keys, 0.0f);  // later keys, hidden by the causal mask
    };
  }
  if (t[drop_mask] && keep < 1) {
    const Tensor bits = t[drop_mask];
    const float factor = 1 / keep;
    const int64_t begin = sequence.score_begin + number * sequence.queries * keys;
    result.drop = [=](int64_t row, float *to) {
      const uint8_t *from = static_cast<const uint8_t *>(bits.data) + bits.offset;
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t bit = begin + row * keys + j;
        to[j] = from[bit / 8] >> (bit % 8) & 1 ? factor : 0.0f;
      }
    };
  }
  return result;
}

}  // namespace sim
