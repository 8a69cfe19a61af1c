// Attention of one head over one sequence, and its gradient, in float32: the arithmetic that all layouts share.
#pragma once

#include <cstdint>
#include <functional>

namespace sim {

// What decides the probabilities of a head beside its queries and keys. Each rule fills a row of `keys` numbers for
// the query `row`; an empty rule is not applied.
struct Head {
  int64_t queries, keys, dim, value_dim;
  float scale;
  bool empty_rows_give_zero;  // else a query that sees no key takes the mean of all values, as a softmax of equals
  std::function<void(int64_t row, uint8_t *hidden)> hide;
  std::function<void(int64_t row, float *bias)> bias;
  std::function<void(int64_t row, float *factor)> drop;  // 0, or 1 / (the probability to be kept)
};

// out = drop(softmax(hide(scale * (query keyᵀ + bias)))) value; query (queries, dim), key (keys, dim), value
// (keys, value_dim), out (queries, value_dim); of each row the largest score and the sum of exp(score - largest).
void attend(const Head &head, const float *query, const float *key, const float *value, float *out, float *largest,
            float *sum);

// The gradients from `gradient` of out, the result `out` and its largest scores and sums; query_gradient is set,
// key_gradient and value_gradient are added to (several query heads may share a key head).
void attend_gradient(const Head &head, const float *query, const float *key, const float *value, const float *gradient,
                     const float *out, const float *largest, const float *sum, float *query_gradient,
                     float *key_gradient, float *value_gradient);

}  // namespace sim
