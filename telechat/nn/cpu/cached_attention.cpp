#include "cached_attention.h"

#include <algorithm>

#include "pool.h"
#include "vector.h"

namespace {

constexpr int KEYS = 4, VECTORS = 4;  // that are read at a time
constexpr int64_t STRETCH = 128;      // tokens whose keys or values all queries meet while they are in the first cache

int64_t padded_dim(int64_t dim) { return (dim + VECTORS * LANES - 1) / (VECTORS * LANES) * VECTORS * LANES; }

// The scores of Q queries with K keys that lie one behind the other.
template <int Q, int K>
void some_scores(const float* queries, int64_t stride, const float* keys, int64_t dim, float scale, float* scores,
                 int64_t row) {
    Floats sums[Q][K] = {};
    for (int64_t i = 0; i < dim; i += LANES) {
        Floats key[K];
#pragma GCC unroll 4
        for (int k = 0; k < K; k++) key[k] = load_first(keys + k * dim + i, dim - i);
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) {
            Floats part = load_first(queries + q * stride + i, dim - i);
#pragma GCC unroll 4
            for (int k = 0; k < K; k++) sums[q][k] += part * key[k];
        }
    }
    if constexpr (Q * K % LANES == 0) {
        float whole[Q * K];
        for (int i = 0; i < Q * K; i += LANES) store(whole + i, sums_of(&sums[0][0] + i) * scale);
        for (int q = 0; q < Q; q++) std::copy(whole + q * K, whole + (q + 1) * K, scores + q * row);
    } else {
        for (int q = 0; q < Q; q++)
            for (int k = 0; k < K; k++) scores[q * row + k] = sum(sums[q][k]) * scale;
    }
}

// From the scores of one query to its weights, which are 0 from `tokens` to `end`; what they must be multiplied by.
float soften(float* scores, int64_t tokens, int64_t end, float slope) {
    for (int64_t t = 0; slope != 0 && t < tokens; t++) scores[t] -= slope * static_cast<float>(tokens - 1 - t);
    std::fill(scores + tokens, scores + end, 0.0f);
    return 1.0f / exponentials(scores, tokens, scores).sum;
}

// What the queries of a call share.
struct Call {
    const float *queries, *keys, *values;
    int64_t stride;
    CacheShape cache;
    const int32_t* table;
    int64_t key_head, row;  // of the cache's heads; from one query's scores to the next one's
    float *scores, *sums;
};

// The scores of Q queries, from `query` on, with the keys from `first` to `last`.
template <int Q>
void add_scores(const Call& call, int64_t query, int64_t first, int64_t last) {
    const int64_t dim = call.cache.dim;
    const float* queries = call.queries + query * call.stride;
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    while (first < last) {
        const float* key = call.keys + call.cache.place(call.table, call.key_head, first);
        float* scores = call.scores + query * call.row + first;
        const int64_t count = std::min(call.cache.block_size - first % call.cache.block_size, last - first);
        int64_t t = 0;
        for (; t + KEYS <= count; t += KEYS)
            some_scores<Q, KEYS>(queries, call.stride, key + t * dim, dim, scale, scores + t, call.row);
        for (; t < count; t++) some_scores<Q, 1>(queries, call.stride, key + t * dim, dim, scale, scores + t, call.row);
        first += count;
    }
}

// Adds the weighted values from `first` to `last` to the sums of Q queries.
template <int Q>
void add_values(const Call& call, int64_t query, int64_t first, int64_t last) {
    const int64_t dim = call.cache.dim, padded = padded_dim(dim);
    for (int64_t i = 0; i < dim; i += VECTORS * LANES) {
        Floats sums[Q][VECTORS];
        float* kept = call.sums + query * padded + i;
        for (int q = 0; q < Q; q++)
            for (int v = 0; v < VECTORS; v++) sums[q][v] = load(kept + q * padded + v * LANES);
        const int64_t left = dim - i;
        for (int64_t from = first; from < last;) {
            const float* value = call.values + call.cache.place(call.table, call.key_head, from) + i;
            const float* weights = call.scores + query * call.row + from;
            const int64_t count = std::min(call.cache.block_size - from % call.cache.block_size, last - from);
            for (int64_t t = 0; t < count; t++, value += dim) {
                Floats part[VECTORS];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    part[v] = left > v * LANES ? load_first(value + v * LANES, left - v * LANES) : Floats{};
#pragma GCC unroll 4
                for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; v++) sums[q][v] += part[v] * weights[q * call.row + t];
            }
            from += count;
        }
        for (int q = 0; q < Q; q++)
            for (int v = 0; v < VECTORS; v++) store(kept + q * padded + v * LANES, sums[q][v]);
    }
}

using Part = void (*)(const Call&, int64_t, int64_t, int64_t);

// Calls a part for groups of up to four queries and stretches of the tokens that some of a group sees.
void for_each_stretch(const Call& call, int count, const int32_t* positions, const Part (&parts)[4]) {
    const int64_t end = *std::max_element(positions, positions + count) + 1;
    for (int64_t first = 0; first < end; first += STRETCH)
        for (int query = 0; query < count; query += 4) {
            const int some = std::min(4, count - query);
            const int64_t seen = *std::max_element(positions + query, positions + query + some) + 1;
            if (first < seen) parts[some - 1](call, query, first, std::min(seen, first + STRETCH));
        }
}

}  // namespace

void attend_cached(int count, const float* queries, int64_t stride, const int32_t* positions, const float* keys,
                   const float* values, const CacheShape& cache, const int32_t* table, int64_t key_head, float slope,
                   float* results) {
    const int64_t dim = cache.dim, padded = padded_dim(dim);
    const int64_t row = (*std::max_element(positions, positions + count) + LANES) / LANES * LANES;
    float* scores = scratch(3, count * (row + padded));
    float* sums = scores + count * row;
    std::fill(sums, sums + count * padded, 0.0f);
    const Call call{queries, keys, values, stride, cache, table, key_head, row, scores, sums};
    for_each_stretch(call, count, positions, {add_scores<1>, add_scores<2>, add_scores<3>, add_scores<4>});
    float shares[MOST_QUERIES];
    for (int q = 0; q < count; q++) shares[q] = soften(scores + q * row, positions[q] + 1, row, slope);
    for_each_stretch(call, count, positions, {add_values<1>, add_values<2>, add_values<3>, add_values<4>});
    for (int q = 0; q < count; q++)
        for (int64_t i = 0; i < dim; i++) results[q * stride + i] = sums[q * padded + i] * shares[q];
}
