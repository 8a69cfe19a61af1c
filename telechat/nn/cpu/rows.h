// Products of few rows with a weight (outputs, inputs): each weight is read once, and that decides their time.
#pragma once

#include <cstdint>

#include "product.h"
#include "quantised.h"

// A weight in rows, or a vector with one row; `type` does not count where it is quantised.
struct Weight {
    const void* data;
    Type type;
    Quantisation how = {};

    float at(int64_t i) const {
        return type == Type::float32 ? static_cast<const float*>(data)[i]
                                     : widen(static_cast<const bfloat16*>(data)[i]);
    }
    explicit operator bool() const { return data != nullptr; }
};

// result[b·stride + o] = Σ_i x[b·inputs + i]·weight[o, i] for `count` outputs from `first` on; by the calling thread.
// A row's bits do not depend on the other rows.
void rows_product(const float* x, int64_t batch, int64_t inputs, Weight weight, int64_t first, int64_t count,
                  float* result, int64_t stride);

// 1/√(mean of squares + ε) of a row, rounded once: a row's error is in all that follows.
inline float inverse_root(float squares, int64_t width, float epsilon) {
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(squares) / width + epsilon));
}

// RMSNorm (arXiv:1910.07467) of rows of x.
void rms_norm_rows(const float* x, int64_t rows, int64_t width, Weight weight, float epsilon, float* result);
