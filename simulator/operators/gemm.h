// Products of float32 matrices and work shared by threads: what the operators' arithmetic is made of.
#pragma once

#include <cstdint>
#include <functional>

namespace sim {

// A matrix as the product reads it: element (i, j) is data[i * row + j * column].
struct MatrixView {
  const float *data;
  int64_t row;
  int64_t column;
};

inline MatrixView transposed(MatrixView m) { return {m.data, m.column, m.row}; }

// c[i * c_row + j] = (accumulate ? c : 0) + sum over k of a(i, k) * b(k, j), summed in float32.
void gemm(int64_t rows, int64_t columns, int64_t depth, MatrixView a, MatrixView b, float *c, int64_t c_row,
          bool accumulate = false);

// Calls part(begin, end) for shares of 0 … count, in two threads where `work` (about a floating-point
// operation each) is worth one. The shares do not depend on what is computed, so results never do on threads.
void in_parallel(int64_t count, double work, const std::function<void(int64_t, int64_t)> &part);

}  // namespace sim
