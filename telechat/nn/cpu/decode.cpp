// One new token of each sequence through a whole model, from its id to the logits.
#include <algorithm>

#include "pool.h"
#include "rows.h"

// The layout is that of decoding.py's ctypes structures.
struct DecodeSizes {
    int64_t batch, layers, hidden, heads, key_value_heads, head_dim, inner, vocabulary, capacity, type;
    float epsilon, input_mult, logits_scale;
};

namespace {

constexpr int64_t TASK_ROWS = 32;  // of a weight, that one thread takes at a time

enum { NORM1, QUERY, KEY_VALUE, DENSE, DENSE_BIAS, NORM2, GATE, UP, DOWN, DOWN_BIAS, KEYS, VALUES, PER_LAYER };

// Rows of some weights that share their input, spread over the threads.
template <typename Then>
void products(const float* x, int64_t batch, int64_t inputs, const Weight* weights, const int64_t* rows, int count,
              float* const* results, const Then& then) {
    int64_t tasks = 0, starts[4];
    for (int i = 0; i < count; i++) {
        starts[i] = tasks;
        tasks += (rows[i] + TASK_ROWS - 1) / TASK_ROWS;
    }
    parallel(tasks, [&](int64_t task) {
        int which = count - 1;
        while (task < starts[which]) which--;
        const int64_t first = (task - starts[which]) * TASK_ROWS, width = std::min(TASK_ROWS, rows[which] - first);
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

// softmax(scale·query·keysᵀ + bias)·values over the first `tokens` of one head's cache.
void attend(const float* query, const float* keys, const float* values, int64_t tokens, int64_t dim, float slope,
            float* scores, float* result) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    float highest = -INFINITY;
    for (int64_t t = 0; t < tokens; t++) {
        Floats sums{};
        const float* key = keys + t * dim;
        for (int64_t i = 0; i < dim; i += LANES) sums += load_first(query + i, dim - i) * load_first(key + i, dim - i);
        scores[t] = sum(sums) * scale - slope * static_cast<float>(tokens - 1 - t);
        highest = std::max(highest, scores[t]);
    }
    Floats totals{};
    for (int64_t t = 0; t < tokens; t += LANES) {
        Floats part = exponential(load_first(scores + t, tokens - t) - highest);
        store_first(scores + t, part, tokens - t);
        totals += load_first(scores + t, tokens - t);
    }
    const float share = 1.0f / sum(totals);
    for (int64_t i = 0; i < dim; i += 4 * LANES) {
        Floats sums[4] = {};
        const int vectors = static_cast<int>(std::min<int64_t>(4, (dim - i + LANES - 1) / LANES));
        for (int64_t t = 0; t < tokens; t++) {
            const float* value = values + t * dim + i;
            for (int v = 0; v < vectors; v++)
                sums[v] += load_first(value + v * LANES, dim - i - v * LANES) * scores[t];
        }
        for (int v = 0; v < vectors; v++)
            store_first(result + i + v * LANES, sums[v] * share, dim - i - v * LANES);
    }
}

}  // namespace

// slots, tokens, positions (B): a sequence's place in the caches, its newest token and where that is; tables cos and sin (positions, D), or slopes (heads): null where the model has none;
// layers: PER_LAYER addresses each, a null bias for none; caches (slots, key-value heads, capacity, D) float32.
extern "C" __attribute__((visibility("default"))) void decode(
    const DecodeSizes* sizes, const int32_t* slots, const int32_t* tokens, const int32_t* positions, const float* cos,
    const float* sin, const float* slopes, const void* embedding, const void* norm, const void* head,
    const void* const* layers, float* logits) {
    const DecodeSizes& s = *sizes;
    const Type type = static_cast<Type>(s.type);
    const int64_t batch = s.batch, hidden = s.hidden, dim = s.head_dim, queries = s.heads * dim;
    const int64_t group = s.heads / s.key_value_heads, pairs = 2 * s.key_value_heads * dim;
    float* x = scratch(2, batch * (2 * hidden + 2 * queries + pairs + 2 * s.inner));
    float *normed = x + batch * hidden, *query = normed + batch * hidden, *attended = query + batch * queries;
    float *key_value = attended + batch * queries, *gate = key_value + batch * pairs, *up = gate + batch * s.inner;
    const Weight table{embedding, type};
    for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0; i < hidden; i++) x[b * hidden + i] = table.at(tokens[b] * hidden + i) * s.input_mult;
    // Adds a finished part of a product, and its bias, to the residual.
    auto add_to_residual = [&](const float* part, Weight bias) {
        return [=](int, int64_t first, int64_t width) {
            for (int64_t b = 0; b < batch; b++)
                for (int64_t i = first; i < first + width; i++)
                    x[b * hidden + i] += part[b * hidden + i] + (bias ? bias.at(i) : 0.0f);
        };
    };
    const auto nothing = [](int, int64_t, int64_t) {};
    for (int64_t layer = 0; layer < s.layers; layer++, layers += PER_LAYER) {
        auto weight = [&](int which) { return Weight{layers[which], type}; };
        rms_norm_rows(x, batch, hidden, weight(NORM1), s.epsilon, normed);
        const Weight first[] = {weight(QUERY), weight(KEY_VALUE)};
        const int64_t first_rows[] = {queries, pairs};
        float* const first_results[] = {query, key_value};
        products(normed, batch, hidden, first, first_rows, 2, first_results, nothing);
        float *keys = static_cast<float*>(const_cast<void*>(layers[KEYS]));
        float *values = static_cast<float*>(const_cast<void*>(layers[VALUES]));
        parallel(batch * s.key_value_heads, [&](int64_t task) {
            const int64_t b = task / s.key_value_heads, head = task % s.key_value_heads, position = positions[b];
            float* pair = key_value + b * pairs + head * 2 * dim;
            const int64_t cache = (slots[b] * s.key_value_heads + head) * s.capacity * dim;
            if (cos != nullptr) rotate(pair, dim, cos + position * dim, sin + position * dim);
            std::memcpy(keys + cache + position * dim, pair, dim * sizeof(float));
            std::memcpy(values + cache + position * dim, pair + dim, dim * sizeof(float));
            for (int64_t h = head * group; h < (head + 1) * group; h++) {
                float* own = query + b * queries + h * dim;
                if (cos != nullptr) rotate(own, dim, cos + position * dim, sin + position * dim);
                attend(own, keys + cache, values + cache, position + 1, dim, slopes == nullptr ? 0 : slopes[h],
                       scratch(3, s.capacity), attended + b * queries + h * dim);
            }
        });
        const Weight dense = weight(DENSE), down = weight(DOWN);
        float* const delta = normed;
        products(attended, batch, queries, &dense, &hidden, 1, &delta, add_to_residual(delta, weight(DENSE_BIAS)));
        rms_norm_rows(x, batch, hidden, weight(NORM2), s.epsilon, normed);
        const Weight gated[] = {weight(GATE), weight(UP)};
        parallel((s.inner + TASK_ROWS - 1) / TASK_ROWS, [&](int64_t task) {
            const int64_t from = task * TASK_ROWS, width = std::min(TASK_ROWS, s.inner - from);
            rows_product(normed, batch, hidden, gated[0], from, width, gate + from, s.inner);
            rows_product(normed, batch, hidden, gated[1], from, width, up + from, s.inner);
            for (int64_t b = 0; b < batch; b++)
                for (int64_t i = 0; i < width; i += LANES) {
                    float* g = gate + b * s.inner + from + i;
                    Floats part = load_first(g, width - i), other = load_first(up + b * s.inner + from + i, width - i);
                    store_first(g, part / (1.0f + exponential(-part)) * other, width - i);
                }
        });
        products(gate, batch, s.inner, &down, &hidden, 1, &delta, add_to_residual(delta, weight(DOWN_BIAS)));
    }
    rms_norm_rows(x, batch, hidden, {norm, type}, s.epsilon, normed);
    const Weight output{head, type};
    products(normed, batch, hidden, &output, &s.vocabulary, 1, &logits, [&](int, int64_t first, int64_t width) {
        for (int64_t b = 0; b < batch; b++)
            for (int64_t i = first; i < first + width; i++) logits[b * s.vocabulary + i] *= s.logits_scale;
    });
}
