#include "cached_attention.h"

#include <algorithm>

#include "pool.h"
#include "vector.h"

namespace {

constexpr int VECTORS = 4;       // of tokens or of values that are read at a time
constexpr int64_t STRETCH = 64;  // tokens whose values all queries meet while they are in the first cache

int64_t padded_dim(int64_t dim) { return (dim + VECTORS * LANES - 1) / (VECTORS * LANES) * VECTORS * LANES; }

// From the scores of one query to its weights, which are 0 from `tokens` to `end`; what they must be multiplied by.
float soften(float* scores, int64_t tokens, int64_t end, float slope) {
    for (int64_t t = 0; slope != 0 && t < tokens; t++) scores[t] -= slope * static_cast<float>(tokens - 1 - t);
    std::fill(scores + tokens, scores + end, 0.0f);
    return 1.0f / exponentials(scores, tokens, scores).sum;
}

// What the queries of a call share.
struct Call {
    const float *keys, *values;
    CacheShape cache;
    const int32_t* table;
    int64_t key_head, row;  // of the cache's heads; from one query's scores to the next one's
    float *queries, *scores, *sums;
};

// The scores of Q queries, of which number i of all lies together, with the keys of V vectors of tokens from `first` on. Each
// is added up in one order, whatever Q and V are.
template <int Q, int V>
void some_scores(const Call& call, int64_t first) {
    const int64_t step = call.cache.block_size;
    const float* keys[V];
    for (int v = 0; v < V; v++) keys[v] = call.keys + call.cache.key_place(call.table, call.key_head, first + v * LANES);
    Floats sums[Q][V] = {};
    for (int64_t i = 0; i < call.cache.dim; i++) {
        Floats key[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) key[v] = load(keys[v] + i * step);
#pragma GCC unroll 16
        for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sums[q][v] += key[v] * call.queries[i * Q + q];
    }
#pragma GCC unroll 16
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(call.scores + q * call.row + first + v * LANES, sums[q][v]);
}

// The scores of all queries with all keys up to a whole row; scratch has room for those of Q queries, of which some are zeros.
template <int Q>
void all_scores(const Call& call, int count, const float* queries, int64_t stride) {
    const int64_t dim = call.cache.dim;
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    for (int64_t i = 0; i < dim; i++)
        for (int q = 0; q < Q; q++) call.queries[i * Q + q] = q < count ? queries[q * stride + i] * scale : 0.0f;
    constexpr int V = Q > VECTORS ? MOST_QUERIES / Q : VECTORS;
    int64_t first = 0;
    for (; first + V * LANES <= call.row; first += V * LANES) some_scores<Q, V>(call, first);
    for (; first < call.row; first += LANES) some_scores<Q, 1>(call, first);
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

// Adds the weighted values to the sums, for groups of up to four queries and stretches of the tokens that some of a group sees.
void all_values(const Call& call, int count, const int32_t* positions) {
    const int64_t end = *std::max_element(positions, positions + count) + 1;
    for (int64_t first = 0; first < end; first += STRETCH)
        for (int query = 0; query < count; query += 4) {
            const int some = std::min(4, count - query);
            const int64_t seen = *std::max_element(positions + query, positions + query + some) + 1;
            if (first >= seen) continue;
            const int64_t last = std::min(seen, first + STRETCH);
            if (some == 4) add_values<4>(call, query, first, last);
            else if (some == 3) add_values<3>(call, query, first, last);
            else if (some == 2) add_values<2>(call, query, first, last);
            else add_values<1>(call, query, first, last);
        }
}

}  // namespace

void attend_cached(int count, const float* queries, int64_t stride, const int32_t* positions, const float* keys,
                   const float* values, const CacheShape& cache, const int32_t* table, int64_t key_head, float slope,
                   float* results) {
    const int64_t dim = cache.dim, padded = padded_dim(dim);
    const int64_t row = (*std::max_element(positions, positions + count) + LANES) / LANES * LANES;
    const int width = count == 1 ? 1 : count <= 4 ? 4 : count <= 8 ? 8 : MOST_QUERIES;
    float* scores = scratch(3, width * (row + dim) + count * padded);
    float *packed = scores + width * row, *sums = packed + width * dim;
    std::fill(sums, sums + count * padded, 0.0f);
    const Call call{keys, values, cache, table, key_head, row, packed, scores, sums};
    if (width == 1) all_scores<1>(call, count, queries, stride);
    else if (width == 4) all_scores<4>(call, count, queries, stride);
    else if (width == 8) all_scores<8>(call, count, queries, stride);
    else all_scores<MOST_QUERIES>(call, count, queries, stride);
    float shares[MOST_QUERIES];
    for (int q = 0; q < count; q++) shares[q] = soften(scores + q * row, positions[q] + 1, row, slope);
    all_values(call, count, positions);
    for (int q = 0; q < count; q++)
        for (int64_t i = 0; i < dim; i++) results[q * stride + i] = sums[q * padded + i] * shares[q];
}
