#include "cached_attention.h"

#include <algorithm>

#include "operator.h"
#include "pool.h"

namespace {

constexpr int KEYS = 4, VECTORS = 4;  // that are read at a time

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
    for (int q = 0; q < Q; q++)
        for (int k = 0; k < K; k++) scores[q * row + k] = sum(sums[q][k]) * scale;
}

// From the scores of one query to its weights, which are 0 from `tokens` to `end`; what they must be multiplied by.
float soften(float* scores, int64_t tokens, int64_t end, float slope) {
    float highest = -INFINITY;
    for (int64_t t = 0; t < tokens; t++) {
        scores[t] -= slope * static_cast<float>(tokens - 1 - t);
        highest = std::max(highest, scores[t]);
    }
    Floats totals{};
    for (int64_t t = 0; t < tokens; t += LANES) {
        store_first(scores + t, exponential(load_first(scores + t, tokens - t) - highest), tokens - t);
        totals += load_first(scores + t, tokens - t);
    }
    std::fill(scores + tokens, scores + end, 0.0f);
    return 1.0f / sum(totals);
}

template <int Q>
void attend(const float* queries, int64_t stride, const int32_t* positions, const float* keys, const float* values,
            const CacheShape& cache, const int32_t* table, int64_t key_head, float slope, float* scores, float* results) {
    const int64_t dim = cache.dim, end = *std::max_element(positions, positions + Q) + 1, row = (end + LANES - 1) / LANES * LANES;
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    for (int64_t first = 0; first < end; first += cache.block_size) {
        const float* block = keys + cache.place(table, key_head, first);
        const int64_t count = std::min(cache.block_size, end - first);
        int64_t t = 0;
        for (; t + KEYS <= count; t += KEYS)
            some_scores<Q, KEYS>(queries, stride, block + t * dim, dim, scale, scores + first + t, row);
        for (; t < count; t++) some_scores<Q, 1>(queries, stride, block + t * dim, dim, scale, scores + first + t, row);
    }
    float shares[Q];
    for (int q = 0; q < Q; q++) shares[q] = soften(scores + q * row, positions[q] + 1, end, slope);
    for (int64_t i = 0; i < dim; i += VECTORS * LANES) {
        Floats sums[Q][VECTORS] = {};
        const int64_t left = dim - i;
        for (int64_t first = 0; first < end; first += cache.block_size) {
            const float* value = values + cache.place(table, key_head, first) + i;
            const int64_t count = std::min(cache.block_size, end - first);
            for (int64_t t = 0; t < count; t++, value += dim) {
                Floats part[VECTORS];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    part[v] = left > v * LANES ? load_first(value + v * LANES, left - v * LANES) : Floats{};
#pragma GCC unroll 4
                for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; v++) sums[q][v] += part[v] * scores[q * row + first + t];
            }
        }
        for (int q = 0; q < Q; q++)
            for (int v = 0; v < VECTORS && left > v * LANES; v++)
                store_first(results + q * stride + i + v * LANES, sums[q][v] * shares[q], left - v * LANES);
    }
}

}  // namespace

void attend_cached(int count, const float* queries, int64_t stride, const int32_t* positions, const float* keys,
                   const float* values, const CacheShape& cache, const int32_t* table, int64_t key_head, float slope,
                   float* scores, float* results) {
    const auto some = count == 4 ? attend<4> : count == 3 ? attend<3> : count == 2 ? attend<2> : attend<1>;
    some(queries, stride, positions, keys, values, cache, table, key_head, slope, scores, results);
}

// For graphs: query (B, S, n, D); a layer's keys and values as `CacheShape` says; tables int32 (B, blocks); positions
// int32 (B, S); ALiBi's slopes (n) or none; what has to be done before → (B, S, n, D).
OPERATOR(cached_attention) {
    const int64_t batch = in.size(0, 0), length = in.size(0, 1), heads = in.size(0, 2), dim = in.size(0, 3);
    const CacheShape cache{in.size(1, 1), in.size(1, 2), dim};
    const int64_t width = in.size(3, 1), tiles = (length + MOST_QUERIES - 1) / MOST_QUERIES;
    const int64_t longest = (width * cache.block_size + LANES - 1) / LANES * LANES;
    const float* slopes = in.absent(5) ? nullptr : in.floats(5);
    parallel(batch * tiles * heads, [&](int64_t task) {
        const int64_t tile = tiles - 1 - task / (batch * heads), b = task / heads % batch, h = task % heads;
        const int64_t first = tile * MOST_QUERIES, place = ((b * length + first) * heads + h) * dim;
        attend_cached(std::min<int64_t>(MOST_QUERIES, length - first), in.floats(0) + place, heads * dim,
                      in.ints(4) + b * length + first, in.floats(1), in.floats(2), cache, in.ints(3) + b * width,
                      h / (heads / cache.heads), slopes == nullptr ? 0 : slopes[h],
                      scratch(3, MOST_QUERIES * longest), in.floats(7) + place);
    });
    return 0;
}
