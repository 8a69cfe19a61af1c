// RMSNorm, SwiGLU, rotary positions and what else goes through memory once.
#include <algorithm>

#include "dropout.h"
#include "operator.h"
#include "pool.h"
#include "rows.h"

namespace {

constexpr int64_t BLOCK = 32;  // rows of a norm that one thread takes at a time

}  // namespace

// x (N, H), weight (H), epsilon → RMSNorm of x's rows.
OPERATOR(rms_norm) {
    const int64_t rows = in.size(0, 0), width = in.size(0, 1);
    parallel_stretches(rows, BLOCK, [&](int64_t first, int64_t count) {
        rms_norm_rows(in.floats(0) + first * width, count, width, {in.data[1], in.type(1)}, in.scalar(2),
                      in.floats(3) + first * width);
    });
    return 0;
}

// dy, x (N, H), weight (H), epsilon → dx (N, H) and dweight (H), float32. With n = x·r, r = 1/√(mean(x²) + ε):
// dweight = Σ dy·n over rows; dx = r·(dy·w − n·mean(dy·w·n)).
OPERATOR(rms_norm_gradient) {
    const int64_t rows = in.size(0, 0), width = in.size(0, 1), blocks = (rows + BLOCK - 1) / BLOCK;
    const Weight weight{in.data[2], in.type(2)};
    float *wide = scratch(4, (blocks + 1) * width), *partial = wide + width;  // each block's share of dweight
    for (int64_t i = 0; i < width; i++) wide[i] = weight.at(i);
    parallel_stretches(rows, BLOCK, [&](int64_t first, int64_t count) {
        float* sums = partial + first / BLOCK * width;
        std::fill(sums, sums + width, 0.0f);
        for (int64_t row = first; row < first + count; row++) {
            const float *dy = in.floats(0) + row * width, *x = in.floats(1) + row * width;
            float* dx = in.floats(4) + row * width;
            Floats squares{}, products{};
            for (int64_t i = 0; i < width; i += LANES) {
                Floats part = load_first(x + i, width - i);
                squares += part * part;
                products += load_first(dy + i, width - i) * load_first(wide + i, width - i) * part;
            }
            const float root = inverse_root(sum(squares), width, in.scalar(3));
            const float along = sum(products) / width * root * root;
            for (int64_t i = 0; i < width; i += LANES) {
                const int64_t left = width - i;
                Floats part = load_first(x + i, left), outer = load_first(dy + i, left);
                store_first(dx + i, (outer * load_first(wide + i, left) - part * along) * root, left);
                store_first(sums + i, load_first(sums + i, left) + outer * part * root, left);
            }
        }
    });
    parallel_stretches(width, LANES, [&](int64_t i, int64_t count) {
        Floats sums{};
        for (int64_t block = 0; block < blocks; block++) sums += load_first(partial + block * width + i, count);
        store_first(in.floats(5) + i, sums, count);
    });
    return 0;
}

// gate, up → SiLU(gate)·up (arXiv:2002.05202).
OPERATOR(swiglu) {
    by_vectors(in.elements(0), [&](int64_t i, int64_t left) {
        Floats gate = load_first(in.floats(0) + i, left), up = load_first(in.floats(1) + i, left);
        store_first(in.floats(2) + i, gate / (1.0f + exponential(-gate)) * up, left);
    });
    return 0;
}

// dy, gate, up → dgate and dup.
OPERATOR(swiglu_gradient) {
    by_vectors(in.elements(0), [&](int64_t i, int64_t left) {
        Floats outer = load_first(in.floats(0) + i, left), gate = load_first(in.floats(1) + i, left);
        Floats up = load_first(in.floats(2) + i, left), sigmoid = 1.0f / (1.0f + exponential(-gate));
        store_first(in.floats(3) + i, outer * up * sigmoid * (1.0f + gate * (1.0f - sigmoid)), left);
        store_first(in.floats(4) + i, outer * gate * sigmoid, left);
    });
    return 0;
}

// x (B, S, n, D); cos and sin (1 or B, 1, S, D) → x·cos + rotate_half(x)·sin.
OPERATOR(rotate) {
    const int64_t rows = in.size(0, 0) * in.size(0, 1), heads = in.size(0, 2), dim = in.size(0, 3);
    const int64_t half = dim / 2, tables = in.elements(1) / dim;
    parallel(rows, [&](int64_t row) {
        const float *cos = in.floats(1) + row % tables * dim, *sin = in.floats(2) + row % tables * dim;
        for (int64_t head = 0; head < heads; head++) {
            const float* x = in.floats(0) + (row * heads + head) * dim;
            float* y = in.floats(3) + (row * heads + head) * dim;
            for (int64_t i = 0; i < half; i += LANES) {
                const int64_t left = half - i;
                const auto part = [=](const float* from) { return load_first(from + i, left); };
                const Floats a = part(x), b = part(x + half);
                store_first(y + i, a * part(cos) - b * part(sin), left);
                store_first(y + half + i, b * part(cos + half) + a * part(sin + half), left);
            }
        }
    });
    return 0;
}

// From descriptions (count, 6), as `Dropout` takes them, the masks (count, rows, columns).
extern "C" __attribute__((visibility("default"))) void dropout_masks(const int32_t* descriptions, int64_t count,
                                                                     int64_t rows, int64_t columns, float* masks) {
    constexpr int64_t AT_ONCE = 64;
    parallel(count * rows, [&](int64_t task) {
        const Dropout mask(descriptions + task / rows * 6, columns);
        for (int64_t column = 0; column < columns; column += AT_ONCE) {
            float part[AT_ONCE];
            std::fill(part, part + AT_ONCE, 1.0f);
            mask.multiply<AT_ONCE>(task % rows, column, part);
            std::copy(part, part + std::min(AT_ONCE, columns - column), masks + task * columns + column);
        }
    });
}

// ids (N), table (V, H) → its rows (N, H), float32.
OPERATOR(embedding) {
    const int64_t width = in.size(1, 1);
    const Weight table{in.data[1], in.type(1)};
    parallel_stretches(in.size(0, 0), BLOCK, [&](int64_t first, int64_t count) {
        for (int64_t row = first; row < first + count; row++) {
            const int64_t from = in.ints(0)[row] * width;
            for (int64_t i = 0; i < width; i++) in.floats(2)[row * width + i] = table.at(from + i);
        }
    });
    return 0;
}

// dx (N, H), ids (N), table (V, H) → the table's gradient (V, H): rows of dx added up in their order.
OPERATOR(embedding_gradient) {
    const int64_t rows = in.size(0, 0), width = in.size(0, 1);
    constexpr int64_t TOKENS = 1024;
    parallel_stretches(in.size(2, 0), TOKENS, [&](int64_t first, int64_t count) {
        float* gradient = in.floats(3);
        std::fill(gradient + first * width, gradient + (first + count) * width, 0.0f);
        for (int64_t row = 0; row < rows; row++) {
            const int64_t token = in.ints(1)[row];
            if (token < first || token >= first + count) continue;
            const float* dx = in.floats(0) + row * width;
            for (int64_t i = 0; i < width; i++) gradient[token * width + i] += dx[i];
        }
    });
    return 0;
}
