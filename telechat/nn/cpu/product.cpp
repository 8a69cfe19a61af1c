// Products by blocks that stay in the caches (Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", 2008): both factors are copied into panels, in which what the innermost loop reads lies together.
#include "product.h"

#include <algorithm>

#include "pool.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t DEPTH = 256;        // of k at a time: a panel of b, 32 KB, stays in the first cache
constexpr int64_t PANEL_GROUP = 8;    // panels of b, and
constexpr int64_t ROW_GROUP = 8;      // panels of a that one task multiplies
constexpr int64_t PACKED = 4 << 20;   // floats of a factor that are packed at a time

int64_t blocks(int64_t whole, int64_t size) { return (whole + size - 1) / size; }

// Panels of `width` rows (or columns): for each k the elements of the panel, 0 where the matrix has none.
template <typename T>
void pack(const T* from, int64_t across, int64_t along, int64_t count, int64_t k, int width, float* to) {
    constexpr int64_t TURNED = 32;  // of k at a time: what is written stays in the first cache
    if (along == 1) {
        for (int64_t first = 0; first < k; first += TURNED)
            for (int64_t i = 0; i < count; i++)
                for (int64_t j = first; j < std::min(k, first + TURNED); j++) to[j * width + i] = widen(from[i * across + j]);
    } else {
        for (int64_t j = 0; j < k; j++)
            for (int64_t i = 0; i < count; i++) to[j * width + i] = widen(from[j * along + i * across]);
    }
    for (int64_t j = 0; count < width && j < k; j++) std::fill(to + j * width + count, to + (j + 1) * width, 0.0f);
}

#if defined(__AVX512BF16__)
// Two vectors rounded to bfloat16, each of the second behind one of the first.
inline Words pair_up(Floats first, Floats second) {
    auto rounded = [](Floats x) {
        Words word = reinterpret_cast<Words>(x);
        Words nearest = word + 0x7fff + ((word >> 16) & 1);
        return reinterpret_cast<Words>(x != x ? reinterpret_cast<Ints>(word | 0x400000) : reinterpret_cast<Ints>(nearest));
    };
    return (rounded(first) >> 16) | (rounded(second) & 0xffff0000u);
}

// The same as pairs of bfloat16, which the machine multiplies: (k, k + 1) of each element together.
template <typename T>
void pack_pairs(const T* from, int64_t across, int64_t along, int64_t count, int64_t k, int width, float* to) {
    if (along == 1) {
        for (int64_t i = 0; i < count; i++) {
            const T* row = from + i * across;
            for (int64_t j = 0; j < k; j += 2 * LANES) {
                float even[LANES] = {}, odd[LANES] = {};
                const int64_t pairs = std::min<int64_t>(LANES, (k - j + 1) / 2);
                for (int64_t p = 0; p < pairs; p++) {
                    even[p] = widen(row[j + 2 * p]);
                    odd[p] = j + 2 * p + 1 < k ? widen(row[j + 2 * p + 1]) : 0.0f;
                }
                float both[LANES];
                store(both, reinterpret_cast<Floats>(pair_up(load(even), load(odd))));
                for (int64_t p = 0; p < pairs; p++) to[(j / 2 + p) * width + i] = both[p];
            }
        }
        for (int64_t p = 0; count < width && 2 * p < k; p++)
            std::fill(to + p * width + count, to + (p + 1) * width, 0.0f);
        return;
    }
    for (int64_t j = 0; j < k; j += 2, to += width)
        for (int64_t i = 0; i < width; i += LANES) {
            const T *even = from + j * along + i, *odd = even + along;
            const int64_t left = count - i;
            Floats first{}, second{};
            if (left > 0 && across == 1) {
                first = load_first(even, left);
                if (j + 1 < k) second = load_first(odd, left);
            } else {
                for (int64_t p = 0; p < std::min<int64_t>(left, LANES); p++) {
                    first[p] = widen(from[(i + p) * across + j * along]);
                    if (j + 1 < k) second[p] = widen(from[(i + p) * across + (j + 1) * along]);
                }
            }
            store_first(to + i, reinterpret_cast<Floats>(pair_up(first, second)), width - i);
        }
}

template <int R>
void pair_product(const float* a, const float* panel, int64_t pairs, float* c, int64_t stride, bool add) {
    __m512 sums[R][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_setzero_ps();
    for (int64_t i = 0; i < pairs; i++, a += R, panel += WIDTH) {
        __m512bh b[VECTORS];
        for (int v = 0; v < VECTORS; v++) b[v] = (__m512bh)_mm512_loadu_ps(panel + v * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            __m512bh factor = (__m512bh)_mm512_set1_ps(a[r]);
            for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], factor, b[v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) {
            float* to = c + r * stride + v * LANES;
            store(to, add ? load(to) + (Floats)sums[r][v] : (Floats)sums[r][v]);
        }
}
#endif

using Kernel = void (*)(const float*, const float*, int64_t, float*, int64_t, bool);

template <int R>
Kernel kernel_of(int rows, bool rounded) {
    if constexpr (R == 0) {
        return nullptr;
    } else {
        if (rows != R) return kernel_of<R - 1>(rows, rounded);
#if defined(__AVX512BF16__)
        if (rounded) return pair_product<R>;
#endif
        return panel_product<R, 1, R>;
    }
}

void pack_any(Matrix matrix, int64_t first, int64_t count, int64_t k, int width, [[maybe_unused]] bool rounded,
              float* to) {
    auto by = [&](auto* data) {
#if defined(__AVX512BF16__)
        if (rounded) return pack_pairs(data + first * matrix.row, matrix.row, matrix.column, count, k, width, to);
#endif
        pack(data + first * matrix.row, matrix.row, matrix.column, count, k, width, to);
    };
    if (matrix.type == Type::float32) by(static_cast<const float*>(matrix.data));
    else by(static_cast<const bfloat16*>(matrix.data));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int multiplies_bfloat16() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

void product(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* result, int64_t stride, bool rounded) {
    rounded = rounded && multiplies_bfloat16();
    // A packed panel's steps along k: single numbers, or pairs in the place of one.
    const int64_t steps = rounded ? blocks(k, 2) : k, depth = DEPTH;
    const int64_t rows = std::max<int64_t>(ROWS, PACKED / std::max<int64_t>(steps, 1) / ROWS * ROWS);
    const int64_t columns = std::max<int64_t>(WIDTH, PACKED / std::max<int64_t>(steps, 1) / WIDTH * WIDTH);
    float* packed_a = scratch(0, std::min(blocks(m, ROWS) * ROWS, rows) * steps);
    float* packed_b = scratch(1, std::min(blocks(n, WIDTH) * WIDTH, columns) * steps);
    const Matrix b_columns = b.transposed();
    for (int64_t first_column = 0; first_column < n; first_column += columns) {
        const int64_t width = std::min(columns, n - first_column), panels = blocks(width, WIDTH);
        for (int64_t first_row = 0; first_row < m; first_row += rows) {
            const int64_t height = std::min(rows, m - first_row), strips = blocks(height, ROWS);
            // Strips of nearly the same height: 32 rows are 11 + 11 + 10.
            auto strip_start = [&](int64_t strip) { return height * strip / strips; };
            const int64_t pack_b = first_row == 0 ? panels : 0;
            parallel(pack_b + strips, [&](int64_t i) {
                if (i < pack_b) {
                    pack_any(b_columns, first_column + i * WIDTH, std::min<int64_t>(WIDTH, width - i * WIDTH), k, WIDTH,
                             rounded, packed_b + i * WIDTH * steps);
                } else {
                    const int64_t start = strip_start(i - pack_b), count = strip_start(i - pack_b + 1) - start;
                    pack_any(a, first_row + start, count, k, count, rounded, packed_a + start * steps);
                }
            });
            const int64_t row_groups = blocks(strips, ROW_GROUP), panel_groups = blocks(panels, PANEL_GROUP);
            parallel(row_groups * panel_groups, [&](int64_t task) {
                const int64_t strip0 = task % row_groups * ROW_GROUP, strip1 = std::min(strips, strip0 + ROW_GROUP);
                const int64_t panel0 = task / row_groups * PANEL_GROUP, panel1 = std::min(panels, panel0 + PANEL_GROUP);
                for (int64_t from = 0; from < steps; from += depth) {
                    const int64_t count = std::min(depth, steps - from);
                    for (int64_t panel = panel0; panel < panel1; panel++) {
                        const int64_t column = first_column + panel * WIDTH;
                        const float* b_part = packed_b + panel * WIDTH * steps + from * WIDTH;
                        for (int64_t strip = strip0; strip < strip1; strip++) {
                            const int64_t start = strip_start(strip), height = strip_start(strip + 1) - start;
                            const float* a_part = packed_a + start * steps + from * height;
                            float* to = result + (first_row + start) * stride + column;
                            const Kernel kernel = kernel_of<ROWS>(height, rounded);
                            if (column + WIDTH <= n) {
                                kernel(a_part, b_part, count, to, stride, from > 0);
                                continue;
                            }
                            float edge[ROWS * WIDTH];
                            kernel(a_part, b_part, count, edge, WIDTH, false);
                            for (int64_t r = 0; r < height; r++)
                                for (int64_t c = 0; c < n - column; c++)
                                    to[r * stride + c] = (from > 0 ? to[r * stride + c] : 0) + edge[r * WIDTH + c];
                        }
                    }
                }
            });
        }
    }
}
