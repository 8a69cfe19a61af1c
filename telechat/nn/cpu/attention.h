// What attention's forward and backward pass share: blocks of queries and keys, packed for `panel_product`.
#pragma once

#include <algorithm>

#include "dropout.h"
#include "operator.h"

constexpr int64_t STRIPS = 4, QUERIES = STRIPS * ROWS;  // of a block of queries
constexpr int64_t KEYS = 64;  // of a block of keys
static_assert(KEYS % WIDTH == 0, "blocks of keys are whole panels");

inline int64_t blocks_of(int64_t whole, int64_t size) { return (whole + size - 1) / size; }

// The inputs that both passes have, in the order of Python's operators.py: segments int32 (1 or B, S): a token sees
// those before it of its own segment; ALiBi's slopes (n); dropout: int32 (B, n, 6); scale.
struct Attention {
    int64_t batch, length, heads, key_value_heads, dim, padded;  // padded: dim as whole panels
    const int32_t* segments;
    bool segments_for_each;
    const float* slopes;
    const int32_t* dropout;
    float scale;

    Attention(const Arguments& in, int query, int key, int segments_at)
        : batch(in.size(query, 0)), length(in.size(query, 1)), heads(in.size(query, 2)),
          key_value_heads(in.size(key, 2)), dim(in.size(query, 3)), padded(blocks_of(dim, WIDTH) * WIDTH),
          segments(in.absent(segments_at) ? nullptr : in.ints(segments_at)),
          segments_for_each(segments != nullptr && in.size(segments_at, 0) > 1),
          slopes(in.absent(segments_at + 1) ? nullptr : in.floats(segments_at + 1)),
          dropout(in.absent(segments_at + 2) ? nullptr : in.ints(segments_at + 2)), scale(in.scalar(segments_at + 3)) {}

    int64_t group() const { return heads / key_value_heads; }
    const int32_t* segments_of(int64_t b) const { return segments + (segments_for_each ? b * length : 0); }
    // (row s, head h) of a tensor (B, S, count, D).
    int64_t place(int64_t b, int64_t s, int64_t h, int64_t count) const {
        return ((b * length + s) * count + h) * dim;
    }
};

// Rows of a head, `stride` apart, as panels of `width` rows; 0 past `count`.
inline void pack_rows(const float* from, int64_t stride, int64_t count, int64_t rows, int width, int64_t dim, float* to) {
    for (int64_t first = 0; first < rows; first += width)
        pack_panel(from + first * stride, stride, 1, count - first, dim, width, to + first * dim);
}

// The same rows as panels of WIDTH columns.
inline void pack_columns(const float* from, int64_t stride, int64_t count, int64_t rows, int64_t dim, float* to) {
    count = std::min(count, rows);
    for (int64_t i = 0; i < dim; i += WIDTH, to += WIDTH * rows) {
        pack_panel(from + i, 1, stride, dim - i, count, WIDTH, to);
        std::fill(to + count * WIDTH, to + rows * WIDTH, 0.0f);
    }
}

// A block of queries as strips of ROWS, multiplied by the scale.
inline void pack_queries(const Attention& a, const float* from, int64_t count, float* to) {
    pack_rows(from, a.heads * a.dim, count, QUERIES, ROWS, a.dim, to);
    for (int64_t i = 0; i < QUERIES * a.dim; i++) to[i] *= a.scale;
}

// c, rows of `width`, = or += strips of R rows, `apart` from each other, · panels of k rows. ROW, STEP: of `panel_product`.
template <int R, int ROW, int STEP>
inline void strips_product(const float* strips, int64_t apart, int64_t count, const float* panels, int64_t k, float* c,
                           int64_t width, bool add) {
    for (int64_t i = 0; i < width; i += WIDTH)
        for (int64_t strip = 0; strip < count; strip++)
            panel_product<R, ROW, STEP>(strips + strip * apart, panels + i * k, k, c + strip * R * width + i, width, add);
}

// scores (QUERIES, KEYS) = strips of queries · panels of keys.
inline void block_scores(const float* strips, const float* keys, int64_t dim, float* scores) {
    strips_product<ROWS, 1, ROWS>(strips, ROWS * dim, STRIPS, keys, dim, scores, KEYS, false);
}

// result (QUERIES, padded) += weights (QUERIES, KEYS) · columns of a block of keys or values.
inline void add_weighted(const float* weights, const float* columns, int64_t padded, float* result) {
    strips_product<ROWS, KEYS, 1>(weights, ROWS * KEYS, STRIPS, columns, KEYS, result, padded, true);
}

// Whether some query of the block from `query` on may see some key of the block from `key` on.
inline bool may_see(const Attention& a, const int32_t* segments, int64_t query, int64_t key) {
    if (segments == nullptr) return true;
    const int64_t query_end = std::min(a.length, query + QUERIES), key_end = std::min(a.length, key + KEYS);
    const auto queries = std::minmax_element(segments + query, segments + query_end);
    const auto keys = std::minmax_element(segments + key, segments + key_end);
    return *queries.first <= *keys.second && *keys.first <= *queries.second;
}

// Adds ALiBi's bias and hides what a query must not see with `hidden`.
inline void bias_and_hide(const Attention& a, const int32_t* segments, int64_t head, int64_t query, int64_t key,
                          float hidden, float* scores) {
    if (key + KEYS <= query + 1 && segments == nullptr && a.slopes == nullptr) return;
    for (int64_t r = 0; r < QUERIES && query + r < a.length; r++, scores += KEYS) {
        const int64_t position = query + r;
        if (a.slopes != nullptr)
            for (int64_t k = 0; k < KEYS; k++) scores[k] -= a.slopes[head] * static_cast<float>(position - key - k);
        if (segments != nullptr)
            for (int64_t k = 0; k < KEYS && key + k < a.length; k++)
                if (segments[key + k] != segments[position]) scores[k] = hidden;
        for (int64_t k = std::max<int64_t>(0, position - key + 1); k < KEYS; k++) scores[k] = hidden;
    }
}

// Multiplies a block by its dropout mask.
inline void drop(const Attention& a, int64_t b, int64_t head, int64_t query, int64_t key, float* block) {
    const Dropout mask(a.dropout + (b * a.heads + head) * 6, a.length);
    for (int64_t r = 0; r < QUERIES && query + r < a.length; r++)
        mask.multiply<KEYS>(query + r, key, block + r * KEYS);
}
