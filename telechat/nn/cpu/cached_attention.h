// Attention over keys and values that lie in a cache in blocks (Kwon et al., arXiv:2309.06180).
#pragma once

#include <cstdint>

// One layer's keys or values, float32; a sequence's row of a table names its blocks. Values are (blocks, heads, block_size, D);
// keys are (blocks, heads, D, block_size), so that one number of many tokens' keys is read together. block_size is a multiple of
// LANES.
struct CacheShape {
    int64_t heads, block_size, dim;

    int64_t block(const int32_t* table, int64_t head, int64_t position) const {
        return (table[position / block_size] * heads + head) * block_size * dim;
    }
    // The first number of a token's value, and of its key, whose others lie block_size apart.
    int64_t place(const int32_t* table, int64_t head, int64_t position) const {
        return block(table, head, position) + position % block_size * dim;
    }
    int64_t key_place(const int32_t* table, int64_t head, int64_t position) const {
        return block(table, head, position) + position % block_size;
    }
};

constexpr int MOST_QUERIES = 16;  // that read keys and values together

// For up to MOST_QUERIES tokens of one sequence and one head: softmax(scale·query·keysᵀ + bias)·values over the tokens up
// to each one's position. What a token gets does not depend on who reads with it, to the bit.
// queries and results: `stride` apart; slope: ALiBi's, or 0.
void attend_cached(int count, const float* queries, int64_t stride, const int32_t* positions, const float* keys,
                   const float* values, const CacheShape& cache, const int32_t* table, int64_t key_head, float slope,
                   float* results);
