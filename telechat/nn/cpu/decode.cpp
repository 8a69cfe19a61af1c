// Tokens of some sequences through a whole model, from their ids to the logits: one new token of each, or the many of
// a prompt. What a token gets does not depend on what is computed with it, to the bit.
#include <algorithm>
#include <numeric>
#include <vector>

#include "cached_attention.h"
#include "pool.h"
#include "rows.h"
#include "shared.h"

// The layout is that of decoding.py's ctypes structures. Where processes share the model, heads, key_value_heads, inner and
// the rows of embedding and head, from first_token on, are those of this one.
struct DecodeSizes {
    int64_t batch, layers, hidden, heads, key_value_heads, head_dim, inner, vocabulary, first_token, rows, block_size,
        table_width, outputs, type, rank;
    float epsilon, input_mult, logits_scale;
    Shared shared;
};

namespace {

constexpr int64_t LEAST_ROWS = 32, MOST_ROWS = 128, TASKS = 8;  // of a weight that one thread takes at a time; of a thread
constexpr int64_t NORM_ROWS = 8;   // of activations, likewise

enum { NORM1, QUERY, KEY_VALUE, DENSE, DENSE_BIAS, NORM2, GATE, UP, DOWN, DOWN_BIAS, KEYS, VALUES, PER_LAYER };
constexpr int PRODUCTS = 6, PLACE[] = {-1, 0, 1, 2, -1, -1, 3, 4, 5};  // which product a weight is, from QUERY to DOWN

// What LoRA adapters add to the products of a layer: B((A·x) ⊙ columns), telechat/adapters/unmerged.py.
struct LowRank {
    const float* columns;        // (batch, rank), 1 where a token takes a column; null: nothing is added
    int64_t rank, batch;
    const void* const* factors;  // A (rank, inputs) and B (outputs, rank) of each product, both null for none
    float* inner;                // (2, batch, rank): (A·x) ⊙ columns of up to two products

    bool changes(int product) const { return columns != nullptr && factors[2 * product] != nullptr; }

    void shrink(const float* x, int64_t inputs, int product, int place) const {
        if (!changes(product)) return;
        float* result = inner + place * batch * rank;
        parallel_stretches(rank, LEAST_ROWS, [&](int64_t first, int64_t width) {
            rows_product(x, batch, inputs, {factors[2 * product], Type::float32}, first, width, result + first, rank);
            for (int64_t b = 0; b < batch; b++)
                for (int64_t i = b * rank + first; i < b * rank + first + width; i++) result[i] *= columns[i];
        });
    }

    // Adds to the outputs [first, first + width) of a product, rows of `stride`; by the calling thread.
    void grow(int product, int place, int64_t first, int64_t width, float* result, int64_t stride) const {
        if (!changes(product)) return;
        float* added = scratch(4, batch * width);
        rows_product(inner + place * batch * rank, batch, rank, {factors[2 * product + 1], Type::float32}, first, width, added,
                     width);
        for (int64_t b = 0; b < batch; b++)
            for (int64_t i = 0; i < width; i++) result[b * stride + first + i] += added[b * width + i];
    }
};

// Rows that one thread takes at a time: it is to read on for a while, and threads are to end together.
int64_t part_rows(int64_t rows) {
    return std::min(MOST_ROWS, std::max(LEAST_ROWS, rows / (TASKS * thread_count()) / 4 * 4));
}

// Rows of some weights that share their input, spread over the threads.
template <typename Then>
void products(const float* x, int64_t batch, int64_t inputs, const Weight* weights, const int64_t* rows, int count,
              float* const* results, const Then& then) {
    const int64_t part = part_rows(std::accumulate(rows, rows + count, int64_t{0}));
    int64_t tasks = 0, starts[4];
    for (int i = 0; i < count; i++) {
        starts[i] = tasks;
        tasks += (rows[i] + part - 1) / part;
    }
    parallel(tasks, [&](int64_t task) {
        int which = count - 1;
        while (task < starts[which]) which--;
        const int64_t first = (task - starts[which]) * part, width = std::min(part, rows[which] - first);
        rows_product(x, batch, inputs, weights[which], first, width, results[which] + first, rows[which]);
        then(which, first, width);
    });
}

void rotate(float* head, int64_t dim, const float* cos, const float* sin) {
    for (int64_t i = 0, half = dim / 2; i < half; i++) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

// Where each group of tokens begins that read the cache together: up to MOST_QUERIES of one sequence; and the end.
std::vector<int64_t> tiles_of(const int32_t* sequences, int64_t batch) {
    std::vector<int64_t> starts;
    for (int64_t b = 0; b < batch; b++)
        if (starts.empty() || b - starts.back() == MOST_QUERIES || sequences[b] != sequences[starts.back()])
            starts.push_back(b);
    starts.push_back(batch);
    return starts;
}

// RMSNorm of some rows, spread over the threads.
void norms(const float* x, int64_t rows, int64_t width, Weight weight, float epsilon, float* result) {
    parallel_stretches(rows, NORM_ROWS, [&](int64_t first, int64_t count) {
        rms_norm_rows(x + first * width, count, width, weight, epsilon, result + first * width);
    });
}

}  // namespace

// For each of B tokens: which row of `tables` (sequences, table_width) is its sequence's, the token, its position, and
// its row of cos and sin (B, D), null where there is ALiBi instead: slopes (heads). Tokens of one sequence stand together
// and rise. outputs: the tokens whose logits are wanted. layers: PER_LAYER addresses each, a null bias for none, and the
// caches' as `CacheShape` says; quantised: PRODUCTS for each layer; columns, factors: as of `LowRank`, 2 · PRODUCTS factors
// a layer.
extern "C" __attribute__((visibility("default"))) void decode(
    const DecodeSizes* sizes, const int32_t* sequences, const int32_t* tables, const int32_t* tokens,
    const int32_t* positions, const float* cos, const float* sin, const float* slopes, const int32_t* outputs,
    const void* embedding, const void* norm, const void* head, const void* const* layers,
    const Quantisation* quantised, const float* columns, const void* const* factors, float* logits) {
    const DecodeSizes& s = *sizes;
    const Type type = static_cast<Type>(s.type);
    const int64_t batch = s.batch, hidden = s.hidden, dim = s.head_dim, queries = s.heads * dim;
    const int64_t group = s.heads / s.key_value_heads, pairs = 2 * s.key_value_heads * dim;
    const CacheShape cache{s.key_value_heads, s.block_size, dim};
    const std::vector<int64_t> tiles = tiles_of(sequences, batch);
    float* x = scratch(2, batch * (2 * hidden + 2 * queries + pairs + 2 * s.inner));
    float *normed = x + batch * hidden, *query = normed + batch * hidden, *attended = query + batch * queries;
    float *key_value = attended + batch * queries, *gate = key_value + batch * pairs, *up = gate + batch * s.inner;
    LowRank adapters{columns, s.rank, batch, factors, columns == nullptr ? nullptr : scratch(5, 2 * batch * s.rank)};
    const Weight embeddings{embedding, type};
    const bool alone = s.shared.memory == nullptr;
    for (int64_t b = 0; b < batch; b++) {
        const int64_t row = tokens[b] - s.first_token;
        const bool here = row >= 0 && row < s.rows;
        for (int64_t i = 0; i < hidden; i++) x[b * hidden + i] = here ? embeddings.at(row * hidden + i) * s.input_mult : 0.0f;
    }
    if (!alone) add_up(s.shared, x, batch * hidden);  // of each row one process has it, the others zeros
    // Adds columns of a product and its bias to the residual.
    auto add_to_residual = [&](const float* product, Weight bias, int64_t first, int64_t width) {
        for (int64_t b = 0; b < batch; b++)
            for (int64_t i = first; i < first + width; i++)
                x[b * hidden + i] += product[b * hidden + i] + (bias ? bias.at(i) : 0.0f);
    };
    // A product of input (batch, inputs), what adapters add to it, and its bias, added to the residual.
    auto residual_product = [&](const float* input, int64_t inputs, Weight weight, Weight bias, int product, float* result) {
        adapters.shrink(input, inputs, product, 0);
        products(input, batch, inputs, &weight, &hidden, 1, &result, [&](int, int64_t first, int64_t width) {
            adapters.grow(product, 0, first, width, result, hidden);
            if (alone) add_to_residual(result, bias, first, width);
        });
        if (alone) return;
        add_up(s.shared, result, batch * hidden);
        add_to_residual(result, bias, 0, hidden);
    };
    for (int64_t layer = 0; layer < s.layers; layer++, layers += PER_LAYER, quantised += PRODUCTS) {
        if (columns != nullptr) adapters.factors = factors + layer * 2 * PRODUCTS;
        auto vector = [&](int which) { return Weight{layers[which], type}; };
        auto weight = [&](int which) { return Weight{layers[which], type, quantised[PLACE[which]]}; };
        norms(x, batch, hidden, vector(NORM1), s.epsilon, normed);
        const Weight first[] = {weight(QUERY), weight(KEY_VALUE)};
        const int64_t first_rows[] = {queries, pairs};
        float* const first_results[] = {query, key_value};
        for (int i = 0; i < 2; i++) adapters.shrink(normed, hidden, PLACE[QUERY] + i, i);
        products(normed, batch, hidden, first, first_rows, 2, first_results, [&](int which, int64_t from, int64_t width) {
            adapters.grow(PLACE[QUERY] + which, which, from, width, first_results[which], first_rows[which]);
        });
        float *keys = static_cast<float*>(const_cast<void*>(layers[KEYS]));
        float *values = static_cast<float*>(const_cast<void*>(layers[VALUES]));
        parallel(batch, [&](int64_t b) {
            const float *turn = cos + b * dim, *lift = sin + b * dim;
            for (int64_t h = 0; cos != nullptr && h < s.heads; h++) rotate(query + b * queries + h * dim, dim, turn, lift);
            for (int64_t h = 0; h < s.key_value_heads; h++) {
                float* pair = key_value + b * pairs + h * 2 * dim;
                if (cos != nullptr) rotate(pair, dim, turn, lift);
                const int32_t* table = tables + sequences[b] * s.table_width;
                float* key = keys + cache.key_place(table, h, positions[b]);
                for (int64_t i = 0; i < dim; i++) key[i * s.block_size] = pair[i];
                std::memcpy(values + cache.place(table, h, positions[b]), pair + dim, dim * sizeof(float));
            }
        });
        const int64_t count = tiles.size() - 1;
        parallel(count * s.heads, [&](int64_t task) {
            // Those that read the same keys one after the other; of these those with the most to read first, so that threads
            // end together.
            const int64_t part = task % (count * group), tile = count - 1 - part / group, b = tiles[tile];
            const int64_t h = task / (count * group) * group + part % group;
            attend_cached(tiles[tile + 1] - b, query + b * queries + h * dim, queries, positions + b, keys, values, cache,
                          tables + sequences[b] * s.table_width, h / group, slopes == nullptr ? 0 : slopes[h],
                          attended + b * queries + h * dim);
        });
        residual_product(attended, queries, weight(DENSE), vector(DENSE_BIAS), PLACE[DENSE], normed);
        norms(x, batch, hidden, vector(NORM2), s.epsilon, normed);
        const Weight gated[] = {weight(GATE), weight(UP)};
        for (int i = 0; i < 2; i++) adapters.shrink(normed, hidden, PLACE[GATE] + i, i);
        parallel_stretches(s.inner, part_rows(s.inner), [&](int64_t from, int64_t width) {
            rows_product(normed, batch, hidden, gated[0], from, width, gate + from, s.inner);
            rows_product(normed, batch, hidden, gated[1], from, width, up + from, s.inner);
            adapters.grow(PLACE[GATE], 0, from, width, gate, s.inner);
            adapters.grow(PLACE[UP], 1, from, width, up, s.inner);
            for (int64_t b = 0; b < batch; b++)
                for (int64_t i = 0; i < width; i += LANES) {
                    float* g = gate + b * s.inner + from + i;
                    Floats part = load_first(g, width - i), other = load_first(up + b * s.inner + from + i, width - i);
                    store_first(g, part / (1.0f + exponential(-part)) * other, width - i);
                }
        });
        residual_product(gate, s.inner, weight(DOWN), vector(DOWN_BIAS), PLACE[DOWN], normed);
    }
    for (int64_t row = 0; row < s.outputs; row++)
        rms_norm_rows(x + outputs[row] * hidden, 1, hidden, {norm, type}, s.epsilon, normed + row * hidden);
    const Weight output{head, type};
    // The last process's rows may reach past the vocabulary.
    const int64_t own = std::max<int64_t>(0, std::min(s.rows, s.vocabulary - s.first_token));
    float* own_logits = alone ? logits : scratch(3, s.outputs * own);
    products(normed, s.outputs, hidden, &output, &own, 1, &own_logits, [&](int, int64_t first, int64_t width) {
        for (int64_t b = 0; b < s.outputs; b++)
            for (int64_t i = first; i < first + width; i++) own_logits[b * own + i] *= s.logits_scale;
    });
    if (alone) return;
    std::fill(logits, logits + s.outputs * s.vocabulary, 0.0f);
    for (int64_t b = 0; b < s.outputs; b++)
        std::copy(own_logits + b * own, own_logits + (b + 1) * own, logits + b * s.vocabulary + s.first_token);
    add_up(s.shared, logits, s.outputs * s.vocabulary);
}
