// The products of training and of prompts.
#include <algorithm>

#include "operator.h"
#include "pool.h"
#include "rows.h"

namespace {

constexpr int64_t FEW = 32;  // rows of x, below which a weight is best read as it lies, once
constexpr int64_t TASK_ROWS = 32;
constexpr int64_t DEQUANTISED = 512;  // rows of a quantised weight that are there as float32 at a time

void add_bias(float* result, int64_t rows, int64_t outputs, Weight bias) {
    if (!bias) return;
    parallel(rows, [&](int64_t row) {
        for (int64_t i = 0; i < outputs; i++) result[row * outputs + i] += bias.at(i);
    });
}

// Rows of a weight as packed, from `first` on → float32 (count, inputs).
void dequantise_all(const void* packed, const Quantisation& how, int64_t inputs, int64_t first, int64_t count, float* to) {
    parallel_stretches(count, TASK_ROWS, [&](int64_t from, int64_t some) {
        dequantise_rows(packed, how, inputs, first + from, some, to + from * inputs);
    });
}

// The product of few rows with a weight, which is read as it lies, spread over the threads.
void product_of_few(const float* x, int64_t rows, int64_t inputs, Weight weight, int64_t outputs, float* result) {
    parallel_stretches(outputs, TASK_ROWS, [&](int64_t first, int64_t count) {
        rows_product(x, rows, inputs, weight, first, count, result + first, outputs);
    });
}

// x (N, in)·weight (out, in)ᵀ, each read as suits so many rows. again: of `product`.
void times_weight(const Arguments& in, Weight weight, int64_t outputs, bool rounded, Again again, float* result) {
    const int64_t rows = in.size(0, 0), inputs = in.size(0, 1);
    if (rows < FEW) product_of_few(in.floats(0), rows, inputs, weight, outputs, result);
    else product(rows, outputs, inputs, {in.data[0], Type::float32, inputs, 1}, {weight.data, weight.type, 1, inputs}, result,
                 outputs, rounded, {}, false, again);
}

// x with its dropout: x (N, in), in place of which it is read, times mask (N, in) or none.
const float* masked(const Arguments& in, int x, int mask) {
    if (in.absent(mask)) return in.floats(x);
    const int64_t rows = in.size(x, 0), width = in.size(x, 1);
    float* result = scratch(13, rows * width);
    parallel(rows, [&](int64_t row) {
        for (int64_t i = row * width; i < (row + 1) * width; i++) result[i] = in.floats(x)[i] * in.floats(mask)[i];
    });
    return result;
}

}  // namespace

// rounded: 1 where factors are to be rounded to bfloat16, else 0. Of `linear` and its gradients the input before the result.

// x (N, in), weight (out, in), bias (out) or none → (N, out).
OPERATOR(linear) {
    const int64_t outputs = in.size(1, 0);
    times_weight(in, {in.data[1], in.type(1)}, outputs, in.scalar(3) != 0, Again::neither, in.floats(4));
    add_bias(in.floats(4), in.size(0, 0), outputs, {in.absent(2) ? nullptr : in.data[2], in.type(2)});
    return 0;
}

// x (N, in), weight of 8 bits (int8) or 4 (uint8) with its scales (out, groups), and order (in) or none; bias (out) or
// none → (N, out).
OPERATOR(quantised_linear) {
    const int64_t rows = in.size(0, 0), inputs = in.size(0, 1), outputs = in.size(1, 0);
    const bool four = std::strstr(in.dtypes[1], "uint8") != nullptr;
    Quantisation how{in.floats(2), in.absent(3) ? nullptr : in.ints(3), in.size(2, 1), four ? 4 : 8};
    const float* x = in.floats(0);
    float* result = in.floats(5);
    if (rows >= FEW) {
        if (how.order != nullptr) {
            float* ordered = scratch(10, rows * inputs);
            reorder(x, rows, inputs, how.order, ordered);
            x = ordered;
        }
        float* block = scratch(11, std::min(DEQUANTISED, outputs) * inputs);
        for (int64_t first = 0; first < outputs; first += DEQUANTISED) {
            const int64_t count = std::min(DEQUANTISED, outputs - first);
            dequantise_all(in.data[1], how, inputs, first, count, block);
            product(rows, count, inputs, {x, Type::float32, inputs, 1}, {block, Type::float32, 1, inputs}, result + first,
                    outputs, false);
        }
    } else {
        product_of_few(x, rows, inputs, {in.data[1], Type::float32, how}, outputs, result);
    }
    add_bias(result, rows, outputs, {in.absent(4) ? nullptr : in.data[4], in.type(4)});
    return 0;
}

// A weight of 8 bits (int8) or 4 (uint8), its scales (out, groups), and x (N, in) → float32 (out, in), as it is packed.
OPERATOR(dequantise) {
    const int64_t outputs = in.size(1, 0), inputs = in.size(2, 1);
    const bool four = std::strstr(in.dtypes[0], "uint8") != nullptr;
    const Quantisation how{in.floats(1), nullptr, in.size(1, 1), four ? 4 : 8};
    dequantise_all(in.data[0], how, inputs, 0, outputs, in.floats(3));
    return 0;
}

// dy (N, out), weight (out, in) → dx (N, in).
OPERATOR(linear_input_gradient) {
    const int64_t rows = in.size(0, 0), outputs = in.size(0, 1), inputs = in.size(1, 1);
    product(rows, inputs, outputs, {in.data[0], Type::float32, outputs, 1}, {in.data[1], in.type(1), inputs, 1},
            in.floats(3), inputs, in.scalar(2) != 0);
    return 0;
}

// dy (N, out), x (N, in) → dweight (out, in).
OPERATOR(linear_weight_gradient) {
    const int64_t rows = in.size(0, 0), outputs = in.size(0, 1), inputs = in.size(1, 1);
    product(outputs, inputs, rows, {in.data[0], Type::float32, 1, outputs}, {in.data[1], Type::float32, inputs, 1},
            in.floats(3), inputs, in.scalar(2) != 0);
    return 0;
}

// x (N, in), weights (out, in) and (out', in) → x times each, (N, out) and (N, out').
OPERATOR(linear_pair) {
    for (int i = 0; i < 2; i++)
        times_weight(in, {in.data[1 + i], in.type(1 + i)}, in.size(1 + i, 0), in.scalar(3) != 0,
                     i == 0 ? Again::neither : Again::a, in.floats(4 + i));
    return 0;
}

// Of these dy (N, out), dy (N, out'), x and the weights → dx (N, in) and the weights' gradients.
OPERATOR(linear_pair_gradient) {
    const int64_t rows = in.size(2, 0), inputs = in.size(2, 1);
    const bool rounded = in.scalar(5) != 0;
    const auto dy = [&](int i) { return Matrix{in.data[i], Type::float32, in.size(i, 1), 1}; };
    const auto weight = [&](int i) { return Matrix{in.data[3 + i], in.type(3 + i), inputs, 1}; };
    product(rows, inputs, in.size(0, 1), dy(0), weight(0), in.floats(6), inputs, rounded, {dy(1), weight(1), in.size(1, 1)});
    for (int i = 0; i < 2; i++)
        product(in.size(i, 1), inputs, rows, dy(i).transposed(), {in.data[2], Type::float32, inputs, 1}, in.floats(7 + i),
                inputs, rounded, {}, false, i == 0 ? Again::neither : Again::b);
    return 0;
}

// With LoRA, whose inner width is r: x (N, in), weight (out, in), bias (out) or none, rounded, a (r, in), b (out, r), mask
// (N, in) or none, scale → x·weightᵀ + bias + scale·((x ⊙ mask)·aᵀ)·bᵀ, (N, out).
OPERATOR(adapted_linear) {
    const int64_t rows = in.size(0, 0), inputs = in.size(0, 1), outputs = in.size(1, 0), rank = in.size(4, 0);
    float *inner = scratch(14, rows * rank), *result = in.floats(8);
    narrow_product(rows, rank, inputs, {masked(in, 0, 6), Type::float32, inputs, 1}, {in.data[4], Type::float32, 1, inputs},
                   in.scalar(7), inner, rank, 1);
    product(rows, outputs, inputs, {in.data[0], Type::float32, inputs, 1}, {in.data[1], in.type(1), 1, inputs}, result,
            outputs, in.scalar(3) != 0, {{inner, Type::float32, rank, 1}, {in.data[5], Type::float32, 1, rank}, rank});
    add_bias(result, rows, outputs, {in.absent(2) ? nullptr : in.data[2], in.type(2)});
    return 0;
}

// dy (N, out) and of these x, weight, rounded, a, b, mask, scale → dx (N, in), da (r, in), db (out, r); the weight is frozen.
OPERATOR(adapted_linear_gradient) {
    const int64_t rows = in.size(0, 0), inputs = in.size(1, 1), outputs = in.size(0, 1), rank = in.size(4, 0);
    const Type type = Type::float32;
    float *inner = scratch(14, rows * rank), *dinner = scratch(15, rows * rank), *dx = in.floats(8);
    const float *x = masked(in, 1, 6), *dy = in.floats(0);
    const float scale = in.scalar(7);
    narrow_product(rows, rank, inputs, {x, type, inputs, 1}, {in.data[4], type, 1, inputs}, scale, inner, rank, 1);
    narrow_product(outputs, rank, rows, {dy, type, 1, outputs}, {inner, type, rank, 1}, 1, in.floats(10), rank, 1);
    narrow_product(rows, rank, outputs, {dy, type, outputs, 1}, {in.data[5], type, rank, 1}, scale, dinner, rank, 1);
    narrow_product(inputs, rank, rows, {x, type, 1, inputs}, {dinner, type, rank, 1}, 1, in.floats(9), 1, inputs);
    const Matrix a{in.data[4], type, inputs, 1}, of_dinner{dinner, type, rank, 1};
    const bool rounded = in.scalar(3) != 0, dropped = !in.absent(6);
    product(rows, inputs, outputs, {dy, type, outputs, 1}, {in.data[2], in.type(2), inputs, 1}, dx, inputs, rounded,
            dropped ? Addend{} : Addend{of_dinner, a, rank});
    if (dropped) {
        float* dmasked = scratch(13, rows * inputs);  // in the place of x with its dropout
        product(rows, inputs, rank, of_dinner, a, dmasked, inputs, rounded);
        parallel(rows, [&](int64_t row) {
            for (int64_t i = row * inputs; i < (row + 1) * inputs; i++) dx[i] += in.floats(6)[i] * dmasked[i];
        });
    }
    return 0;
}

// x (N, H) → the sum of its rows (H): in one order, by columns.
OPERATOR(column_sums) {
    const int64_t rows = in.size(0, 0), width = in.size(0, 1);
    constexpr int64_t COLUMNS = 4 * LANES;
    parallel_stretches(width, COLUMNS, [&](int64_t first, int64_t count) {
        for (int64_t i = first; i < first + count; i += LANES) {
            Floats sums{};
            for (int64_t row = 0; row < rows; row++) sums += load_first(in.floats(0) + row * width + i, width - i);
            store_first(in.floats(1) + i, sums, width - i);
        }
    });
    return 0;
}
