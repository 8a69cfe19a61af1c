// Weights of 8 or 4 bits with a scale for each group of inputs; ../quantised.py has their layout.
#pragma once

#include <cstdint>

// What a product has besides its packed values. The layout is that of decoding.py's ctypes structure.
struct Quantisation {
    const float* scales;   // (outputs, groups); null: the weight is not quantised
    const int32_t* order;  // which input each packed column is for; null: they stand in order
    int64_t groups, bits;
};

// Rows [first, first + count) of a weight as float32, one behind the other, their columns as they are packed.
void dequantise_rows(const void* packed, const Quantisation& how, int64_t inputs, int64_t first, int64_t count,
                     float* result);

// As rows_product, to the bit what the dequantised rows would give.
void quantised_rows_product(const float* x, int64_t batch, int64_t inputs, const void* packed, const Quantisation& how,
                            int64_t first, int64_t count, float* result, int64_t stride);

// x (rows, inputs) with its columns in the order of the packed ones.
void reorder(const float* x, int64_t rows, int64_t inputs, const int32_t* order, float* result);
