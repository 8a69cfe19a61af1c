// Weights of 8 or 4 bits with a scale for each group of inputs; ../quantised.py has their layout.
#pragma once

#include <cstdint>

#include "vector.h"

// What a product has besides its packed values. The layout is that of decoding.py's ctypes structure.
struct Quantisation {
    const float* scales;   // (outputs, groups); null: the weight is not quantised
    const int32_t* order;  // which input each packed column is for; null: they stand in order
    int64_t groups, bits;
};

constexpr uint64_t CHUNK = 128, STEP = 16;  // inputs that share words of four bits, and those of one shift of the words

// How a row of eight bits is read: its values from input i on, a vector of them, times the scale that `factor` is made of.
struct EightBits {
    static constexpr bool QUANTISED = true;
    static constexpr int64_t LINE = 64;  // inputs in 64 bytes
    static int64_t row_bytes(int64_t inputs) { return inputs; }
    static Floats factor(float scale) { return broadcast(scale); }
    // Compilers make single numbers of such a conversion, unless told how.
    static Floats values(const uint8_t* row, uint64_t i, Floats factor) {
#if defined(__AVX512F__)
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i));
        return (Floats)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes)) * factor;
#elif defined(__AVX2__)
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + i));
        return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)) * factor;
#else
        Ints wide;
        for (int lane = 0; lane < LANES; lane++) wide[lane] = static_cast<int8_t>(row[i + lane]);
        return __builtin_convertvector(wide, Floats) * factor;
#endif
    }
};

// The same of four bits.
struct FourBits {
    static constexpr bool QUANTISED = true;
    static constexpr int64_t LINE = 128;
    static int64_t row_bytes(uint64_t inputs) { return (inputs + CHUNK - 1) / CHUNK * CHUNK / 2; }
    static Words words(const uint8_t* row, uint64_t i) {
        typedef uint32_t LooseWords __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
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

// Rows [first, first + count) of a weight as float32, one behind the other, their columns as they are packed.
void dequantise_rows(const void* packed, const Quantisation& how, int64_t inputs, int64_t first, int64_t count,
                     float* result);

// x (rows, inputs) with its columns in the order of the packed ones.
void reorder(const float* x, int64_t rows, int64_t inputs, const int32_t* order, float* result);
