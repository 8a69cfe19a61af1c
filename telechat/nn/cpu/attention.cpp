// Causal attention without S × S scores (Dao et al., arXiv:2205.14135): softmax is carried from block to block of keys.
#include "attention.h"

#include "pool.h"

namespace {

constexpr int64_t CHUNK = 8;  // blocks of queries that one task takes, and packs keys and values for
constexpr float HIDDEN = -1e30f;  // finite: a row may see nothing of a block

// The softmax so far of each query of a block.
struct Running {
    float highest[QUERIES], total[QUERIES];
};

// From scores to weights e^(score − highest), and what was summed before brought to the new highest.
void soften(float* scores, int64_t padded, Running& so_far, float* result) {
    for (int64_t r = 0; r < QUERIES; r++, scores += KEYS, result += padded) {
        Floats most = load(scores);
        for (int64_t k = LANES; k < KEYS; k += LANES) most = greater(load(scores + k), most);
        const float highest = std::max(so_far.highest[r], largest(most));
        Floats totals{};
        for (int64_t k = 0; k < KEYS; k += LANES) {
            Floats part = exponential(load(scores + k) - highest);
            store(scores + k, part);
            totals += part;
        }
        const float share = std::exp(so_far.highest[r] - highest);
        so_far.total[r] = so_far.total[r] * share + sum(totals);
        so_far.highest[r] = highest;
        if (share != 1.0f)
            for (int64_t i = 0; i < padded; i += LANES) store(result + i, load(result + i) * share);
    }
}

}  // namespace

// query (B, S, n, D), key and value (B, S, m, D), and what `Attention` names → (B·S, n·D), and the logarithm of each
// row's sum of exponentials (B, n, S), from which the backward pass makes the weights again.
OPERATOR(attention) {
    const Attention a(in, 0, 1, 3);
    const int64_t chunks = blocks_of(a.length, CHUNK * QUERIES), key_stride = a.key_value_heads * a.dim;
    parallel(a.batch * a.heads * chunks, [&](int64_t task) {
        // The longest rows first, so that threads end together.
        const int64_t chunk = chunks - 1 - task / (a.batch * a.heads), b = task / a.heads % a.batch, head = task % a.heads;
        const int64_t start = chunk * CHUNK * QUERIES, end = std::min(a.length, start + CHUNK * QUERIES);
        const int64_t key_blocks = blocks_of(end, KEYS), shared = head / a.group();
        const int32_t* segments = a.segments == nullptr ? nullptr : a.segments_of(b);
        float* keys = scratch(5, key_blocks * KEYS * (a.dim + a.padded));
        float* values = keys + key_blocks * KEYS * a.dim;
        float* strips = scratch(6, QUERIES * (a.dim + KEYS + a.padded));
        float *scores = strips + QUERIES * a.dim, *result = scores + QUERIES * KEYS;
        for (int64_t block = 0; block < key_blocks; block++) {
            const int64_t first = block * KEYS, count = a.length - first, from = a.place(b, first, shared, a.key_value_heads);
            pack_rows(in.floats(1) + from, key_stride, count, KEYS, WIDTH, a.dim, keys + first * a.dim);
            pack_columns(in.floats(2) + from, key_stride, count, KEYS, a.dim, values + first * a.padded);
        }
        for (int64_t query = start; query < end; query += QUERIES) {
            pack_queries(a, in.floats(0) + a.place(b, query, head, a.heads), a.length - query, strips);
            Running so_far;
            std::fill(so_far.highest, so_far.highest + QUERIES, HIDDEN);
            std::fill(so_far.total, so_far.total + QUERIES, 0.0f);
            std::fill(result, result + QUERIES * a.padded, 0.0f);
            for (int64_t key = 0; key < std::min(a.length, query + QUERIES); key += KEYS) {
                if (!may_see(a, segments, query, key)) continue;
                block_scores(strips, keys + key * a.dim, a.dim, scores);
                bias_and_hide(a, segments, head, query, key, HIDDEN, scores);
                soften(scores, a.padded, so_far, result);
                if (a.dropout != nullptr) drop(a, b, head, query, key, scores);
                add_weighted(scores, values + key * a.padded, a.padded, result);
            }
            for (int64_t r = 0; r < QUERIES && query + r < a.length; r++) {
                float* to = in.floats(7) + a.place(b, query + r, head, a.heads);
                for (int64_t i = 0; i < a.dim; i++) to[i] = result[r * a.padded + i] / so_far.total[r];
                in.floats(8)[(b * a.heads + head) * a.length + query + r] =
                    so_far.highest[r] + std::log(so_far.total[r]);
            }
        }
    });
    return 0;
}
