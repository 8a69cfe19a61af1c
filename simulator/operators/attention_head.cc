#include "attention_head.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "gemm.h"

namespace sim {
namespace {

constexpr int64_t kBlock = 128;          // queries at a time
constexpr float kHidden = -3.0e38f;      // a hidden score: finite, so that a row of nothing else is a mean

// Rows [from, from + rows) of the scores, scaled, biased and hidden; of each row whether it sees a key.
void scores_of(const Head &head, const float *query, const float *key, int64_t from, int64_t rows, float *scores,
               std::vector<bool> &sees) {
  gemm(rows, head.keys, head.dim, {query + from * head.dim, head.dim, 1}, {key, 1, head.dim}, scores, head.keys);
  std::vector<float> bias(head.keys);
  std::vector<uint8_t> hidden(head.keys);
  sees.assign(rows, true);
  for (int64_t i = 0; i < rows; ++i) {
    float *row = scores + i * head.keys;
    if (head.bias) {
      head.bias(from + i, bias.data());
      for (int64_t j = 0; j < head.keys; ++j) row[j] += bias[j];
    }
    for (int64_t j = 0; j < head.keys; ++j) row[j] *= head.scale;
    if (head.hide) {
      head.hide(from + i, hidden.data());
      for (int64_t j = 0; j < head.keys; ++j) row[j] = hidden[j] ? kHidden : row[j];
      sees[i] = std::find(hidden.begin(), hidden.end(), 0) != hidden.end();
    }
  }
}

void drop_rows(const Head &head, int64_t from, int64_t rows, float *values) {
  if (!head.drop) return;
  std::vector<float> factor(head.keys);
  for (int64_t i = 0; i < rows; ++i) {
    head.drop(from + i, factor.data());
    for (int64_t j = 0; j < head.keys; ++j) values[i * head.keys + j] *= factor[j];
  }
}

float factor_of(const Head &head, bool sees, float sum) {
  return !sees && head.empty_rows_give_zero ? 0.0f : 1.0f / sum;
}

}  // namespace

void attend(const Head &head, const float *query, const float *key, const float *value, float *out, float *largest,
            float *sum) {
  std::vector<float> scores(std::min(kBlock, head.queries) * head.keys);
  std::vector<bool> sees;
  for (int64_t from = 0; from < head.queries; from += kBlock) {
    const int64_t rows = std::min(kBlock, head.queries - from);
    scores_of(head, query, key, from, rows, scores.data(), sees);
    for (int64_t i = 0; i < rows; ++i) {
      float *row = scores.data() + i * head.keys;
      largest[from + i] = head.keys ? *std::max_element(row, row + head.keys) : 0;
      float total = 0;
      for (int64_t j = 0; j < head.keys; ++j) total += row[j] = std::exp(row[j] - largest[from + i]);
      sum[from + i] = total;
      const float factor = factor_of(head, sees[i], total);
      for (int64_t j = 0; j < head.keys; ++j) row[j] *= factor;
    }
    drop_rows(head, from, rows, scores.data());
    gemm(rows, head.value_dim, head.keys, {scores.data(), head.keys, 1}, {value, head.value_dim, 1},
         out + from * head.value_dim, head.value_dim);
  }
}

void attend_gradient(const Head &head, const float *query, const float *key, const float *value, const float *gradient,
                     const float *out, const float *largest, const float *sum, float *query_gradient,
                     float *key_gradient, float *value_gradient) {
  const int64_t most = std::min(kBlock, head.queries);
  std::vector<float> probabilities(most * head.keys), dropped, change(most * head.keys);
  std::vector<bool> sees;
  for (int64_t from = 0; from < head.queries; from += kBlock) {
    const int64_t rows = std::min(kBlock, head.queries - from), width = head.value_dim;
    scores_of(head, query, key, from, rows, probabilities.data(), sees);
    for (int64_t i = 0; i < rows; ++i) {
      const float factor = factor_of(head, sees[i], sum[from + i]);
      float *row = probabilities.data() + i * head.keys;
      for (int64_t j = 0; j < head.keys; ++j) row[j] = std::exp(row[j] - largest[from + i]) * factor;
    }
    dropped = probabilities;
    drop_rows(head, from, rows, dropped.data());
    const MatrixView incoming{gradient + from * width, width, 1};
    gemm(head.keys, width, rows, {dropped.data(), 1, head.keys}, incoming, value_gradient, width, true);
    gemm(rows, head.keys, width, incoming, {value, 1, width}, change.data(), head.keys);
    drop_rows(head, from, rows, change.data());
    for (int64_t i = 0; i < rows; ++i) {
      float mean = 0;
      for (int64_t d = 0; d < width; ++d) mean += gradient[(from + i) * width + d] * out[(from + i) * width + d];
      for (int64_t j = i * head.keys; j < (i + 1) * head.keys; ++j) {
        change[j] = probabilities[j] * (change[j] - mean) * head.scale;
      }
    }
    gemm(rows, head.dim, head.keys, {change.data(), head.keys, 1}, {key, head.dim, 1},
         query_gradient + from * head.dim, head.dim);
    gemm(head.keys, head.dim, rows, {change.data(), 1, head.keys}, {query + from * head.dim, head.dim, 1},
         key_gradient, head.dim, true);
  }
}

}  // namespace sim
