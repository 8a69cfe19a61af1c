#include "quantised.h"

#include <algorithm>

#include "pool.h"
#include "rows.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr uint64_t CHUNK = 128, STEP = 16;  // inputs that share words, and those of one shift of the words
constexpr int64_t FEW = 4;                 // rows of x, beyond which a row of the weight is made once for all of them

// LANES whole numbers of a byte each. Compilers make single ones of such a conversion, unless told how.
inline Floats load_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Floats)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes));
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
    Ints wide;
    for (int i = 0; i < LANES; i++) wide[i] = static_cast<int8_t>(from[i]);
    return __builtin_convertvector(wide, Floats);
#endif
}

typedef uint32_t LooseWords __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

// One row's values from input i on, a vector of them, times the scale that `factor` was made of.
struct Eight {
    static int64_t row_bytes(int64_t inputs) { return inputs; }
    static Floats factor(float scale) { return broadcast(scale); }
    static Floats values(const uint8_t* row, uint64_t i, Floats factor) {
        return load_bytes(row + i) * factor;
    }
};

struct Four {
    static int64_t row_bytes(uint64_t inputs) { return (inputs + CHUNK - 1) / CHUNK * CHUNK / 2; }
    static Words words(const uint8_t* row, uint64_t i) {
        const uint8_t* from = row + i / CHUNK * (CHUNK / 2) + i % STEP * sizeof(uint32_t);
        return *reinterpret_cast<const LooseWords*>(from) >> static_cast<uint32_t>(i / STEP % 8 * 4);
    }
#if defined(__AVX512F__)
    // The sixteen values times the scale; the low bits of a word choose one.
    static Floats factor(float scale) {
        const Floats levels = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
        return levels * scale;
    }
    static Floats values(const uint8_t* row, uint64_t i, Floats factor) {
        return (Floats)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)words(row, i), (__m512)factor);
    }
#else
    static Floats factor(float scale) { return broadcast(scale); }
    static Floats values(const uint8_t* row, uint64_t i, Floats factor) {
        const Ints bits = reinterpret_cast<Ints>(words(row, i) & 15u);
        return (__builtin_convertvector(bits, Floats) - 8.0f) * factor;
    }
#endif
};

template <typename Kind, int R, int B>
void tile(const float* x, int64_t inputs, const uint8_t* rows, const float* scales, int64_t groups, float* result,
          int64_t stride) {
    const int64_t group = inputs / groups, bytes = Kind::row_bytes(inputs);
    Floats sums[B][R] = {};
    for (int64_t g = 0; g < groups; g++) {
        Floats factor[R];
        for (int r = 0; r < R; r++) factor[r] = Kind::factor(scales[r * groups + g]);
        const auto step = [&](int64_t i) __attribute__((always_inline)) {
            Floats part[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) part[r] = Kind::values(rows + r * bytes, i, factor[r]);
#pragma GCC unroll 4
            for (int b = 0; b < B; b++) {
                const Floats own = load(x + b * inputs + i);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) sums[b][r] += own * part[r];
            }
        };
        int64_t i = g * group;
        if (group % CHUNK == 0)  // shifts are known then
            for (; i < (g + 1) * group; i += CHUNK) {
                const int64_t chunk = i / CHUNK;
#pragma GCC unroll 32
                for (int64_t k = 0; k < static_cast<int64_t>(CHUNK); k += LANES) step(chunk * CHUNK + k);
            }
        for (; i < (g + 1) * group; i += LANES) step(i);
        // The next rows: the machine itself sees them late.
        for (int r = 0; r < R; r++)
            for (int64_t i = g * bytes / groups; i < (g + 1) * bytes / groups; i += 64)
                __builtin_prefetch(rows + (r + R) * bytes + i);
    }
    for (int b = 0; b < B; b++)
        for (int r = 0; r < R; r++) result[b * stride + r] = sum(sums[b][r]);
}

template <typename Kind, int R>
void rows_of(const float* x, int64_t batch, int64_t inputs, const uint8_t* rows, const float* scales, int64_t groups,
             float* result, int64_t stride) {
    if (batch == 4) tile<Kind, R, 4>(x, inputs, rows, scales, groups, result, stride);
    if (batch == 3) tile<Kind, R, 3>(x, inputs, rows, scales, groups, result, stride);
    if (batch == 2) tile<Kind, R, 2>(x, inputs, rows, scales, groups, result, stride);
    if (batch == 1) tile<Kind, R, 1>(x, inputs, rows, scales, groups, result, stride);
}

template <typename Kind>
void few(const float* x, int64_t batch, int64_t inputs, const uint8_t* rows, const float* scales, int64_t groups,
         int64_t count, float* result, int64_t stride) {
    const int64_t bytes = Kind::row_bytes(inputs);
    int64_t row = 0;
    for (; row + 4 <= count; row += 4)
        rows_of<Kind, 4>(x, batch, inputs, rows + row * bytes, scales + row * groups, groups, result + row, stride);
    for (; row < count; row++)
        rows_of<Kind, 1>(x, batch, inputs, rows + row * bytes, scales + row * groups, groups, result + row, stride);
}

template <typename Kind>
void dequantise(const uint8_t* rows, const float* scales, int64_t groups, int64_t inputs, int64_t count, float* result) {
    const int64_t group = inputs / groups, bytes = Kind::row_bytes(inputs);
    for (int64_t row = 0; row < count; row++, rows += bytes, result += inputs)
        for (int64_t g = 0; g < groups; g++) {
            const Floats factor = Kind::factor(*scales++);
            for (int64_t i = g * group; i < (g + 1) * group; i += LANES) store(result + i, Kind::values(rows, i, factor));
        }
}

int64_t row_bytes(const Quantisation& how, int64_t inputs) {
    return how.bits == 8 ? Eight::row_bytes(inputs) : Four::row_bytes(inputs);
}

}  // namespace

void reorder(const float* x, int64_t rows, int64_t inputs, const int32_t* order, float* result) {
    for (int64_t row = 0; row < rows; row++, x += inputs, result += inputs)
        for (int64_t i = 0; i < inputs; i++) result[i] = x[order[i]];
}

void dequantise_rows(const void* packed, const Quantisation& how, int64_t inputs, int64_t first, int64_t count,
                     float* result) {
    const uint8_t* rows = static_cast<const uint8_t*>(packed) + first * row_bytes(how, inputs);
    const auto by = how.bits == 8 ? dequantise<Eight> : dequantise<Four>;
    by(rows, how.scales + first * how.groups, how.groups, inputs, count, result);
}

void quantised_rows_product(const float* x, int64_t batch, int64_t inputs, const void* packed, const Quantisation& how,
                            int64_t first, int64_t count, float* result, int64_t stride) {
    if (how.order != nullptr) {
        float* ordered = scratch(8, batch * inputs);
        reorder(x, batch, inputs, how.order, ordered);
        x = ordered;
    }
    if (batch > FEW) {
        float* rows = scratch(9, count * inputs);
        dequantise_rows(packed, how, inputs, first, count, rows);
        rows_product(x, batch, inputs, {rows, Type::float32}, 0, count, result, stride);
        return;
    }
    const uint8_t* rows = static_cast<const uint8_t*>(packed) + first * row_bytes(how, inputs);
    const auto by = how.bits == 8 ? few<Eight> : few<Four>;
    by(x, batch, inputs, rows, how.scales + first * how.groups, how.groups, count, result, stride);
}
