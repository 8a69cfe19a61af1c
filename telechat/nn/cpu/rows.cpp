#include "rows.h"

#include <algorithm>

namespace {

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

}  // namespace

void rows_product(const float* x, int64_t batch, int64_t inputs, Weight weight, int64_t first, int64_t count,
                  float* result, int64_t stride) {
    if (weight.type == Type::float32)
        all_rows(x, batch, inputs, static_cast<const float*>(weight.data) + first * inputs, count, result, stride);
    else
        all_rows(x, batch, inputs, static_cast<const bfloat16*>(weight.data) + first * inputs, count, result, stride);
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
