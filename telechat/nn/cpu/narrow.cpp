// Products of few columns, as LoRA's are (16 beside a thousand): packing the wide factor would take as long as they do.
#include <algorithm>

#include "pool.h"
#include "product.h"

namespace {

constexpr int TALL = ROWS < 8 ? ROWS : 8;  // rows of a tile, whose sums are in registers
constexpr int64_t TILES = 8;               // of a task, beside each other: what lies in one line of a cache is read once
constexpr int64_t DEPTH = 128;             // of k at a time

// sums (R, V·LANES) += Σ_k a[r·row + k·step]·panel[k·V·LANES …]. Unlike `panel_product` it carries the sums on from part to
// part of k, so that a long k is added up in one row.
template <int R, int V>
void add_tile(const float* a, int64_t row, int64_t step, const float* panel, int64_t k, float* sums) {
    Floats part[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) part[r][v] = load(sums + (r * V + v) * LANES);
    for (int64_t i = 0; i < k; i++, a += step, panel += V * LANES) {
        Floats b[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) b[v] = load(panel + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            Floats factor = broadcast(a[r * row]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) part[r][v] += factor * b[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(sums + (r * V + v) * LANES, part[r][v]);
}

template <int V>
void columns(int64_t m, int64_t first, int64_t count, int64_t k, Matrix a, const float* panel, float scale, float* result,
             int64_t row, int64_t column) {
    constexpr int64_t width = V * LANES;
    const float* data = static_cast<const float*>(a.data);
    const int64_t height = m < TALL ? 1 : TALL, group = TILES * height;
    parallel_stretches(m, group, [&](int64_t start, int64_t some) {
        const int64_t end = start + some;
        float sums[TILES * TALL * width] = {};
        for (int64_t from = 0; from < k; from += DEPTH)
            for (int64_t i = start; i < end; i += height) {
                const int64_t top = std::min(i, m - height);  // the last tile's first rows may be another's
                (height == 1 ? add_tile<1, V> : add_tile<TALL, V>)(
                    data + top * a.row + from * a.column, a.row, a.column, panel + from * width,
                    std::min(DEPTH, k - from), sums + (i - start) * width);
            }
        for (int64_t i = start; i < end; i++) {
            const int64_t tile = start + (i - start) / height * height, top = std::min(tile, m - height);
            const float* of_row = sums + (tile - start + i - top) * width;
            for (int64_t j = 0; j < count; j++) result[i * row + (first + j) * column] = scale * of_row[j];
        }
    });
}

}  // namespace

void narrow_product(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float scale, float* result, int64_t row,
                    int64_t column) {
    for (int64_t first = 0; first < n; first += WIDTH) {
        const int64_t count = std::min<int64_t>(WIDTH, n - first);
        const bool one = count <= LANES;
        const int width = one ? LANES : WIDTH;
        float* panel = scratch(12, k * width);
        pack_panel(static_cast<const float*>(b.data) + first * b.column, b.column, b.row, count, k, width, panel);
        (one ? columns<1> : columns<VECTORS>)(m, first, count, k, a, panel, scale, result, row, column);
    }
}
