// Products by blocks that stay in the caches (Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", 2008): both factors are copied into panels, in which what the innermost loop reads lies together.
#include "product.h"

#include <algorithm>

#include "pool.h"

namespace {

constexpr int64_t DEPTH = 256;        // of k at a time: a panel of b, 32 KB, stays in the first cache
constexpr int64_t PANEL_GROUP = 8;    // panels of b, and
constexpr int64_t ROW_GROUP = 8;      // panels of a that one task multiplies
constexpr int64_t PACKED = 4 << 20;   // floats of a factor that are packed at a time

int64_t blocks(int64_t whole, int64_t size) { return (whole + size - 1) / size; }

#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif

// A packed panel's steps along k are single numbers or, where the machine multiplies bfloat16, pairs of these (k, k + 1)
// in the place of one. LANES steps of one row that lies along k, from step `first` on; 0 behind its end.
template <bool pairs, typename T>
inline Floats steps_of_row(const T* row, int64_t first, int64_t k) {
    auto numbers = [&](int64_t from) { return from < k ? load_first(row + from, k - from) : Floats{}; };
    if constexpr (!pairs) return numbers(first);
#if defined(__AVX512BF16__)
    else if constexpr (sizeof(T) == 2)
        return (Floats)_mm512_maskz_loadu_epi16(_bzhi_u32(~0u, std::clamp<int64_t>(k - 2 * first, 0, 32)), row + 2 * first);
    else return (Floats)_mm512_cvtne2ps_pbh((__m512)numbers(2 * first + LANES), (__m512)numbers(2 * first));
#endif
}

// One step of the first `count` of LANES rows that lie beside each other; `along` further on is their next number.
template <bool pairs, typename T>
inline Floats step_of_rows(const T* rows, [[maybe_unused]] int64_t along, int64_t count, [[maybe_unused]] bool last) {
    Floats first = load_first(rows, count);
    if constexpr (!pairs) return first;
#if defined(__AVX512BF16__)
    else {
        Floats second = last ? Floats{} : load_first(rows + along, count);
        auto halves = [](Floats x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)); };
        return (Floats)_mm512_or_si512(halves(first), _mm512_slli_epi32(halves(second), 16));
    }
#endif
}

// Panels of `width` rows (or columns): for each step those of the panel together, 0 where the matrix has none. Element
// (i, j) lies at i·across + j·along, one of which is 1. Steps are written in order, for a step's vector may reach into
// the next one's place; the last one's may not.
template <bool pairs, typename T>
void pack(const T* from, int64_t across, int64_t along, int64_t count, int64_t k, int width, float* to) {
    const int64_t steps = pairs ? (k + 1) / 2 : k;
    auto write = [&](int64_t step, int64_t i, Floats x) {
        float* place = to + step * width + i;
        if (step + 1 < steps) store(place, x);
        else store_first(place, x, width - i);
    };
    if (along == 1) {
        for (int64_t step = 0; step < steps; step += LANES)
            for (int64_t i = 0; i < width; i += LANES) {
                Floats rows[LANES];  // unrolled, so that they stay in registers
#pragma GCC unroll 16
                for (int64_t row = 0; row < LANES; row++)
                    rows[row] = i + row < count ? steps_of_row<pairs>(from + (i + row) * across, step, k) : Floats{};
                transpose(rows);
#pragma GCC unroll 16
                for (int64_t s = 0; s < LANES; s++)
                    if (step + s < steps) write(step + s, i, rows[s]);
            }
    } else {
        for (int64_t step = 0; step < steps; step++) {
            const int64_t number = pairs ? 2 * step : step;
            for (int64_t i = 0; i < width; i += LANES)
                write(step, i, i < count ? step_of_rows<pairs>(from + number * along + i, along, count - i, number + 1 == k)
                                         : Floats{});
        }
    }
}

#if defined(__AVX512BF16__)
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

void pack_any(Matrix matrix, int64_t first, int64_t count, int64_t k, int width, bool rounded, float* to) {
    auto by = [&](auto* data) {
        auto how = rounded ? pack<PAIRS, std::decay_t<decltype(*data)>> : pack<false, std::decay_t<decltype(*data)>>;
        how(data + first * matrix.row, matrix.row, matrix.column, count, k, width, to);
    };
    if (matrix.type == Type::float32) by(static_cast<const float*>(matrix.data));
    else by(static_cast<const bfloat16*>(matrix.data));
}

}  // namespace

void pack_panel(const float* from, int64_t across, int64_t along, int64_t count, int64_t k, int width, float* to) {
    pack<false>(from, across, along, count, k, width, to);
}

extern "C" __attribute__((visibility("default"))) int multiplies_bfloat16() { return PAIRS; }

void product(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* result, int64_t stride, bool rounded,
             Addend added, bool more, Again again) {
    rounded = rounded && PAIRS;
    const int64_t own = rounded ? blocks(k, 2) : k, steps = own + (rounded ? blocks(added.k, 2) : added.k);
    // Evenly: each part reads and writes the result, and a thin one would do little else.
    const int64_t depth = blocks(steps, std::max<int64_t>(1, blocks(steps - DEPTH / 8, DEPTH)));
    const int64_t rows = std::max<int64_t>(ROWS, PACKED / std::max<int64_t>(steps, 1) / ROWS * ROWS);
    const int64_t columns = std::max<int64_t>(WIDTH, PACKED / std::max<int64_t>(steps, 1) / WIDTH * WIDTH);
    float* packed_a = scratch(0, std::min(blocks(m, ROWS) * ROWS, rows) * steps);
    float* packed_b = scratch(1, std::min(blocks(n, WIDTH) * WIDTH, columns) * steps);
    // Of both factors the added ones' numbers lie behind the others.
    auto pack_both = [&](Matrix first, Matrix second, int64_t start, int64_t count, int width, float* to) {
        pack_any(first, start, count, k, width, rounded, to);
        if (added.k > 0) pack_any(second, start, count, added.k, width, rounded, to + own * width);
    };
    // What was packed in parts is not all there.
    const bool a_is_there = again == Again::a && m <= rows, b_is_there = again == Again::b && n <= columns;
    for (int64_t first_column = 0; first_column < n; first_column += columns) {
        const int64_t width = std::min(columns, n - first_column), panels = blocks(width, WIDTH);
        for (int64_t first_row = 0; first_row < m; first_row += rows) {
            const int64_t height = std::min(rows, m - first_row), strips = blocks(height, ROWS);
            // Strips of nearly the same height: 32 rows are 11 + 11 + 10.
            auto strip_start = [&](int64_t strip) { return height * strip / strips; };
            const int64_t pack_b = first_row == 0 && !b_is_there ? panels : 0;
            parallel(pack_b + (a_is_there ? 0 : strips), [&](int64_t i) {
                if (i < pack_b) {
                    pack_both(b.transposed(), added.b.transposed(), first_column + i * WIDTH,
                              std::min<int64_t>(WIDTH, width - i * WIDTH), WIDTH, packed_b + i * WIDTH * steps);
                } else {
                    const int64_t start = strip_start(i - pack_b), count = strip_start(i - pack_b + 1) - start;
                    pack_both(a, added.a, first_row + start, count, count, packed_a + start * steps);
                }
            });
            const int64_t row_groups = blocks(strips, ROW_GROUP), panel_groups = blocks(panels, PANEL_GROUP);
            parallel(row_groups * panel_groups, [&](int64_t task) {
                const int64_t strip0 = task % row_groups * ROW_GROUP, strip1 = std::min(strips, strip0 + ROW_GROUP);
                const int64_t panel0 = task / row_groups * PANEL_GROUP, panel1 = std::min(panels, panel0 + PANEL_GROUP);
                for (int64_t from = 0; from < steps; from += depth) {
                    const int64_t count = std::min(depth, steps - from);
                    const bool add = more || from > 0;
                    for (int64_t panel = panel0; panel < panel1; panel++) {
                        const int64_t column = first_column + panel * WIDTH;
                        const float* b_part = packed_b + panel * WIDTH * steps + from * WIDTH;
                        for (int64_t strip = strip0; strip < strip1; strip++) {
                            const int64_t start = strip_start(strip), height = strip_start(strip + 1) - start;
                            const float* a_part = packed_a + start * steps + from * height;
                            float* to = result + (first_row + start) * stride + column;
                            const Kernel kernel = kernel_of<ROWS>(height, rounded);
                            if (column + WIDTH <= n) {
                                for (int64_t r = 0; r < height; r++)
                                    for (int64_t c = 0; c < WIDTH; c += LANES) __builtin_prefetch(to + r * stride + c, 1);
                                kernel(a_part, b_part, count, to, stride, add);
                                continue;
                            }
                            float edge[ROWS * WIDTH];
                            kernel(a_part, b_part, count, edge, WIDTH, false);
                            for (int64_t r = 0; r < height; r++)
                                for (int64_t c = 0; c < n - column; c++)
                                    to[r * stride + c] = (add ? to[r * stride + c] : 0) + edge[r * WIDTH + c];
                        }
                    }
                }
            });
        }
    }
}
