// Matrix products.
#pragma once

#include <cstdint>

#include "vector.h"

enum class Type { float32, bfloat16 };

// Element (i, j) lies at data[i·row + j·column].
struct Matrix {
    const void* data;
    Type type;
    int64_t row, column;

    Matrix transposed() const { return {data, type, column, row}; }
};

// Two more factors, (m, k) and (k, n), whose product is added.
struct Addend {
    Matrix a, b;
    int64_t k = 0;
};

// Which of a product's factors is that of the calling thread's last product, in the same place of it and likewise
// rounded, so that it need not be packed again.
enum class Again { neither, a, b };

// result (m, n), rows `stride` apart, = a (m, k) · b (k, n) + added.a · added.b, k > 0. Sums are float32 and added up in
// one order, so that a row's bits do not depend on the other rows or on the number of threads.
// `rounded`: factors are rounded to bfloat16 where the machine multiplies these. `more`: added to what the result holds.
void product(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* result, int64_t stride, bool rounded,
             Addend added = {}, bool more = false, Again again = Again::neither);

// A product of few columns (narrow.cpp): result[i·row + j·column] = scale · Σ_l a[i, l]·b[l, j], in the same way; float32
// alone, and only b is copied.
void narrow_product(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float scale, float* result, int64_t row,
                    int64_t column);

// `count` rows (or columns) of k numbers as a panel of `width`: for each of the k those of all rows together, 0 where there
// is no row. Number j of row i lies at i·across + j·along, one of which is 1.
void pack_panel(const float* from, int64_t across, int64_t along, int64_t count, int64_t k, int width, float* to);

// The innermost part of products: R rows times one panel of b, WIDTH columns that lie together for each k.
#if defined(__AVX512F__)
constexpr int ROWS = 14, VECTORS = 2;
#elif defined(__AVX2__)
constexpr int ROWS = 6, VECTORS = 2;
#elif defined(__aarch64__)
constexpr int ROWS = 6, VECTORS = 4;
#else
constexpr int ROWS = 4, VECTORS = 2;
#endif
constexpr int WIDTH = VECTORS * LANES;

// c (R, WIDTH), rows `stride` apart, = or += Σ_k a[r·ROW + k·STEP]·panel[k·WIDTH …].
template <int R, int ROW, int STEP>
inline void panel_product(const float* a, const float* panel, int64_t k, float* c, int64_t stride, bool add) {
    Floats sums[R][VECTORS] = {};
    for (int64_t i = 0; i < k; i++, a += STEP, panel += WIDTH) {
        Floats b[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) b[v] = load(panel + v * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            Floats factor = broadcast(a[r * ROW]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[r][v] += factor * b[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            float* to = c + r * stride + v * LANES;
            store(to, add ? load(to) + sums[r][v] : sums[r][v]);
        }
}
