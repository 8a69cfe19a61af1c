// Attention's backward pass: the weights of each block are made again from the rows' sums.
#include "attention.h"

#include "pool.h"

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int KEY_ROWS = 8;  // of the products with turned weights
#else
constexpr int KEY_ROWS = 4;
#endif

// sums (KEYS, padded) += weightsᵀ (KEYS, QUERIES) · columns of a block of queries.
void add_turned(const float* weights, const float* columns, int64_t padded, float* sums) {
    strips_product<KEY_ROWS, 1, KEYS>(weights, KEY_ROWS, KEYS / KEY_ROWS, columns, QUERIES, sums, padded, true);
}

// Rows times a factor, in the place of those that are there or, where there are `more`, added to them.
void write_rows(const float* from, int64_t padded, int64_t rows, int64_t dim, float factor, float* to, int64_t stride,
                bool more) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < dim; i++) to[r * stride + i] = from[r * padded + i] * factor + (more ? to[r * stride + i] : 0);
}

}  // namespace

// dy and y (B·S, n·D), query (B, S, n, D), key and value (B, S, m, D), the rows' logarithms (B, n, S), and what
// `Attention` names → the gradients of query, key and value. With weights P: dS = P·(dP − Σ dy·y).
OPERATOR(attention_gradient) {
    const Attention a(in, 2, 3, 6);
    const int64_t rows = blocks_of(a.length, QUERIES) * QUERIES;
    const int64_t stride = a.heads * a.dim, key_stride = a.key_value_heads * a.dim;
    parallel(a.batch * a.key_value_heads, [&](int64_t task) {
        const int64_t b = task / a.key_value_heads, shared = task % a.key_value_heads;
        const int32_t* segments = a.segments == nullptr ? nullptr : a.segments_of(b);
        float* memory = scratch(5, rows * (2 * a.dim + 3 * a.padded + 2) + KEYS * (2 * a.dim + 3 * a.padded)
                                       + 2 * QUERIES * KEYS);
        auto take = [&](int64_t floats) { return memory += floats, memory - floats; };
        float *query_strips = take(rows * a.dim), *dy_strips = take(rows * a.dim);
        float *query_columns = take(rows * a.padded), *dy_columns = take(rows * a.padded);
        float *dquery = take(rows * a.padded), *logs = take(rows), *along = take(rows);
        float *dkey = take(KEYS * a.padded), *dvalue = take(KEYS * a.padded);
        float *key_rows = take(KEYS * a.dim), *value_rows = take(KEYS * a.dim);
        float *key_columns = take(KEYS * a.padded), *weights = take(QUERIES * KEYS), *dweights = take(QUERIES * KEYS);
        for (int64_t head = shared * a.group(); head < (shared + 1) * a.group(); head++) {
            for (int64_t row = 0; row < rows; row += QUERIES) {
                const int64_t from = a.place(b, row, head, a.heads), count = a.length - row;
                pack_queries(a, in.floats(2) + from, count, query_strips + row * a.dim);
                pack_rows(in.floats(0) + from, stride, count, QUERIES, ROWS, a.dim, dy_strips + row * a.dim);
                pack_columns(in.floats(2) + from, stride, count, QUERIES, a.dim, query_columns + row * a.padded);
                pack_columns(in.floats(0) + from, stride, count, QUERIES, a.dim, dy_columns + row * a.padded);
            }
            for (int64_t row = 0; row < rows; row++) {
                along[row] = 0;
                logs[row] = INFINITY;  // rows that are not there have no weights
                if (row >= a.length) continue;
                const int64_t from = a.place(b, row, head, a.heads);
                logs[row] = in.floats(5)[(b * a.heads + head) * a.length + row];
                Floats sums{};
                for (int64_t i = 0; i < a.dim; i += LANES)
                    sums += load_first(in.floats(0) + from + i, a.dim - i) * load_first(in.floats(1) + from + i, a.dim - i);
                along[row] = sum(sums);
            }
            std::fill(dquery, dquery + rows * a.padded, 0.0f);
            for (int64_t key = 0; key < a.length; key += KEYS) {
                const int64_t from = a.place(b, key, shared, a.key_value_heads), count = a.length - key;
                pack_rows(in.floats(3) + from, key_stride, count, KEYS, WIDTH, a.dim, key_rows);
                pack_rows(in.floats(4) + from, key_stride, count, KEYS, WIDTH, a.dim, value_rows);
                pack_columns(in.floats(3) + from, key_stride, count, KEYS, a.dim, key_columns);
                std::fill(dkey, dkey + 2 * KEYS * a.padded, 0.0f);  // and dvalue
                for (int64_t query = key / QUERIES * QUERIES; query < a.length; query += QUERIES) {
                    if (!may_see(a, segments, query, key)) continue;
                    block_scores(query_strips + query * a.dim, key_rows, a.dim, weights);
                    bias_and_hide(a, segments, head, query, key, -INFINITY, weights);
                    for (int64_t r = 0; r < QUERIES; r++)
                        for (int64_t k = 0; k < KEYS; k += LANES) {
                            float* at = weights + r * KEYS + k;
                            store(at, exponential(load(at) - logs[query + r]));
                        }
                    block_scores(dy_strips + query * a.dim, value_rows, a.dim, dweights);
                    if (a.dropout != nullptr) drop(a, b, head, query, key, dweights);
                    for (int64_t r = 0; r < QUERIES; r++)
                        for (int64_t k = 0; k < KEYS; k += LANES) {
                            float* at = dweights + r * KEYS + k;
                            store(at, load(weights + r * KEYS + k) * (load(at) - along[query + r]));
                        }
                    if (a.dropout != nullptr) drop(a, b, head, query, key, weights);
                    add_turned(weights, dy_columns + query * a.padded, a.padded, dvalue);
                    add_turned(dweights, query_columns + query * a.padded, a.padded, dkey);
                    add_weighted(dweights, key_columns, a.padded, dquery + query * a.padded);
                }
                const bool more = head > shared * a.group();  // heads before had the same keys
                write_rows(dkey, a.padded, std::min(count, KEYS), a.dim, a.scale, in.floats(11) + from, key_stride, more);
                write_rows(dvalue, a.padded, std::min(count, KEYS), a.dim, 1.0f, in.floats(12) + from, key_stride, more);
            }
            write_rows(dquery, a.padded, a.length, a.dim, a.scale, in.floats(10) + a.place(b, 0, head, a.heads), stride,
                       false);
        }
    });
    return 0;
}
