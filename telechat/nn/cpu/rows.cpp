#include "rows.h"

#include <algorithm>

#include "pool.h"

namespace {

constexpr int64_t FEW = 12;  // rows of x, up to which a weight is best read as it lies

// R outputs of B rows of x at a time: so many sums keep the memory busy, and each x is used R times.
template <typename T, int R, int B>
void tile(const float* x, int64_t inputs, const T* weight, float* result, int64_t stride) {
    Floats sums[B][R] = {};
    int64_t i = 0;
    for (; i + LANES <= inputs; i += LANES) {
        Floats part[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            part[r] = load(weight + r * inputs + i);
            __builtin_prefetch(weight + (r + R) * inputs + i);  // the next rows: the machine itself sees them late
        }
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) {
            Floats factor = load(x + b * inputs + i);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sums[b][r] += factor * part[r];
        }
    }
    for (int r = 0; i < inputs && r < R; r++) {
        Floats part = load_first(weight + r * inputs + i, inputs - i);
        for (int b = 0; b < B; b++) sums[b][r] += load_first(x + b * inputs + i, inputs - i) * part;
    }
    for (int b = 0; b < B; b++)
        for (int r = 0; r < R; r++) result[b * stride + r] = sum(sums[b][r]);
}

template <typename T, int R>
void rows_of(const float* x, int64_t batch, int64_t inputs, const T* weight, float* result, int64_t stride) {
    for (; batch >= 4; batch -= 4, x += 4 * inputs, result += 4 * stride)
        tile<T, R, 4>(x, inputs, weight, result, stride);
    if (batch == 3) tile<T, R, 3>(x, inputs, weight, result, stride);
    if (batch == 2) tile<T, R, 2>(x, inputs, weight, result, stride);
    if (batch == 1) tile<T, R, 1>(x, inputs, weight, result, stride);
}

template <typename T>
void all_rows(const float* x, int64_t batch, int64_t inputs, const T* weight, int64_t count, float* result,
              int64_t stride) {
    int64_t row = 0;
    for (; row + 4 <= count; row += 4) rows_of<T, 4>(x, batch, inputs, weight + row * inputs, result + row, stride);
    for (; row < count; row++) rows_of<T, 1>(x, batch, inputs, weight + row * inputs, result + row, stride);
}

// Many rows: the same sums in the same order, with both factors copied to where what is read together lies together.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int OUTPUTS = 4, INPUTS = 2;  // of a tile, whose sums are in registers
#else
constexpr int OUTPUTS = 4, INPUTS = 6;
#endif
constexpr int64_t STEPS = 64;  // vectors along a row before the next tile's turn: what they meet stays in the first cache

// `height` rows from `row` on (fewer at the end: 0 past `count`), vector by vector of each.
template <int height, typename T>
void pack_tile(const T* from, int64_t row, int64_t count, int64_t inputs, int64_t first, int64_t steps, float* to) {
    for (int64_t i = first * LANES; i < (first + steps) * LANES; i += LANES)
        for (int64_t r = row; r < row + height; r++, to += LANES)
            store(to, r < count ? load_first(from + r * inputs + i, inputs - i) : Floats{});
}

void add_tile(const float* x, const float* weight, int64_t steps, float* sums) {
    Floats part[INPUTS][OUTPUTS];
#pragma GCC unroll 6
    for (int b = 0; b < INPUTS; b++)
#pragma GCC unroll 4
        for (int r = 0; r < OUTPUTS; r++) part[b][r] = load(sums + (b * OUTPUTS + r) * LANES);
    for (int64_t i = 0; i < steps; i++, x += INPUTS * LANES, weight += OUTPUTS * LANES) {
        Floats row[OUTPUTS];
#pragma GCC unroll 4
        for (int r = 0; r < OUTPUTS; r++) row[r] = load(weight + r * LANES);
#pragma GCC unroll 6
        for (int b = 0; b < INPUTS; b++) {
            Floats factor = load(x + b * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < OUTPUTS; r++) part[b][r] += factor * row[r];
        }
    }
#pragma GCC unroll 6
    for (int b = 0; b < INPUTS; b++)
#pragma GCC unroll 4
        for (int r = 0; r < OUTPUTS; r++) store(sums + (b * OUTPUTS + r) * LANES, part[b][r]);
}

template <typename T>
void many_rows(const float* x, int64_t batch, int64_t inputs, const T* weight, int64_t count, float* result,
               int64_t stride) {
    const int64_t vectors = (inputs + LANES - 1) / LANES, tiles = (count + OUTPUTS - 1) / OUTPUTS;
    constexpr int64_t TILE = INPUTS * OUTPUTS * LANES, X_PART = STEPS * INPUTS * LANES;
    float* packed = scratch(7, tiles * OUTPUTS * vectors * LANES + X_PART + tiles * TILE);
    float *rows = packed + tiles * OUTPUTS * vectors * LANES, *sums = rows + X_PART;
    for (int64_t tile = 0; tile < tiles; tile++)
        pack_tile<OUTPUTS>(weight, tile * OUTPUTS, count, inputs, 0, vectors, packed + tile * OUTPUTS * vectors * LANES);
    for (int64_t b = 0; b < batch; b += INPUTS) {
        std::fill(sums, sums + tiles * TILE, 0.0f);
        for (int64_t first = 0; first < vectors; first += STEPS) {
            const int64_t steps = std::min(STEPS, vectors - first);
            pack_tile<INPUTS>(x, b, batch, inputs, first, steps, rows);
            for (int64_t tile = 0; tile < tiles; tile++)
                add_tile(rows, packed + (tile * vectors + first) * OUTPUTS * LANES, steps, sums + tile * TILE);
        }
        for (int64_t row = b; row < std::min(batch, b + INPUTS); row++)
            for (int64_t o = 0; o < count; o++)
                result[row * stride + o] =
                    sum(load(sums + (o / OUTPUTS) * TILE + ((row - b) * OUTPUTS + o % OUTPUTS) * LANES));
    }
}

template <typename T>
void any_rows(const float* x, int64_t batch, int64_t inputs, const T* weight, int64_t count, float* result,
              int64_t stride) {
    (batch > FEW ? many_rows<T> : all_rows<T>)(x, batch, inputs, weight, count, result, stride);
}

}  // namespace

void rows_product(const float* x, int64_t batch, int64_t inputs, Weight weight, int64_t first, int64_t count,
                  float* result, int64_t stride) {
    if (weight.how.scales != nullptr)
        quantised_rows_product(x, batch, inputs, weight.data, weight.how, first, count, result, stride);
    else if (weight.type == Type::float32)
        any_rows(x, batch, inputs, static_cast<const float*>(weight.data) + first * inputs, count, result, stride);
    else
        any_rows(x, batch, inputs, static_cast<const bfloat16*>(weight.data) + first * inputs, count, result, stride);
}

void rms_norm_rows(const float* x, int64_t rows, int64_t width, Weight weight, float epsilon, float* result) {
    for (int64_t row = 0; row < rows; row++, x += width, result += width) {
        Floats squares{};
        for (int64_t i = 0; i < width; i += LANES) {
            Floats part = load_first(x + i, width - i);
            squares += part * part;
        }
        const float root = inverse_root(sum(squares), width, epsilon);
        for (int64_t i = 0; i < width; i++) result[i] = x[i] * root * weight.at(i);
    }
}
