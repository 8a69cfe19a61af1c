// Vectors of floats as wide as the machine has them (AVX-512, AVX2, NEON, SSE), in the compilers' vector extension.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
constexpr int LANES = VECTOR_BYTES / 4;

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef float LooseFloats __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef uint16_t LooseHalves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

struct bfloat16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }

inline float widen(bfloat16 x) {
    uint32_t word = static_cast<uint32_t>(x.bits) << 16;
    float result;
    std::memcpy(&result, &word, 4);
    return result;
}

inline Floats broadcast(float x) { return x - Floats{}; }

inline Floats load(const float* from) { return *reinterpret_cast<const LooseFloats*>(from); }

inline Floats load(const bfloat16* from) {
    Halves halves = *reinterpret_cast<const LooseHalves*>(from);
    return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}

inline void store(float* to, Floats x) { *reinterpret_cast<LooseFloats*>(to) = x; }

// To the nearest bfloat16, ties to even; NaN stays NaN.
inline Halves narrow(Floats x) {
    const Words word = reinterpret_cast<Words>(x), high = word >> 16;
    return __builtin_convertvector(x == x ? (word + 0x7fff + (high & 1)) >> 16 : high | 64, Halves);
}

// The first `count` of a vector's elements, the others 0.
template <typename T>
inline Floats load_first(const T* from, int64_t count) {
    if (count >= LANES) return load(from);
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return (Floats)_mm512_maskz_loadu_ps((1 << count) - 1, from);
#endif
    T all[LANES] = {};
    std::memcpy(all, from, count * sizeof(T));
    return load(all);
}

inline void store_first(bfloat16* to, Floats x, int64_t count) {
    const Halves halves = narrow(x);
    if (count >= LANES) *reinterpret_cast<LooseHalves*>(to) = halves;
    else std::memcpy(to, &halves, count * sizeof(bfloat16));
}

inline void store_first(float* to, Floats x, int64_t count) {
    if (count >= LANES) return store(to, x);
#if defined(__AVX512F__)
    return _mm512_mask_storeu_ps(to, (1 << count) - 1, (__m512)x);
#endif
    std::memcpy(to, &x, count * sizeof(float));
}

// Square roots, rounded to the nearest.
inline Floats square_root(Floats x) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) x[i] = std::sqrt(x[i]);
    return x;
}

// All elements taken together by halves, so in one order.
template <int h, size_t... lane>
inline Floats turned(Floats x, std::index_sequence<lane...>) {
    return __builtin_shufflevector(x, x, static_cast<int>((lane + h) % LANES)...);
}

template <int h = LANES / 2, typename Both>
inline float fold(Floats x, const Both& both) {
    x = both(x, turned<h>(x, std::make_index_sequence<LANES>()));
    if constexpr (h == 1) return x[0];
    else return fold<h / 2>(x, both);
}

inline float sum(Floats x) {
    return fold(x, [](Floats a, Floats b) { return a + b; });
}

inline Floats greater(Floats a, Floats b) { return a > b ? a : b; }

inline float largest(Floats x) { return fold(x, greater); }

// Of two vectors that hold 2h elements of each of some sums, one that holds h: each the sum of two that are h apart.
template <int h, size_t... i>
inline Floats half_sums(Floats a, Floats b, std::index_sequence<i...>) {
    constexpr auto from = [](size_t lane) {
        const size_t half = LANES / 2, place = lane % half;
        return static_cast<int>((lane < half ? 0 : LANES) + place / h * 2 * h + place % h);
    };
    return __builtin_shufflevector(a, b, from(i)...) + __builtin_shufflevector(a, b, (from(i) + h)...);
}

// The `sum` of each of LANES vectors, with its very bits: in the same order, with fewer shuffles.
template <int h = LANES / 2>
inline Floats sums_of(const Floats* x) {
    Floats halves[h];
#pragma GCC unroll 8
    for (int i = 0; i < h; i++)
        halves[i] = half_sums<h>(x[2 * i], x[2 * i + 1], std::make_index_sequence<LANES>());
    if constexpr (h == 1) return halves[0];
    else return sums_of<h / 2>(halves);
}

// Lanes whose number has the bit h change places: those of a without it stay, as do those of b with it.
template <int h, size_t... lane>
inline void exchange(Floats& a, Floats& b, std::index_sequence<lane...>) {
    Floats first = __builtin_shufflevector(a, b, static_cast<int>(lane & h ? LANES + lane - h : lane)...);
    b = __builtin_shufflevector(a, b, static_cast<int>(lane & h ? LANES + lane : lane + h)...);
    a = first;
}

// LANES vectors as the rows of a square, turned to its columns.
template <int h = LANES / 2>
inline void transpose(Floats* x) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if ((i & h) == 0) exchange<h>(x[i], x[i + h], std::make_index_sequence<LANES>());
    if constexpr (h > 1) transpose<h / 2>(x);
}

// e^x within 2 units in the last place: x = n·ln 2 + r, and a polynomial in r (Cephes' expf). 0 below −87.3.
inline Floats exponential(Floats x) {
    constexpr float LOWEST = -87.3365f, HIGHEST = 88.7228f, ROUND = 12582912.0f;  // 1.5·2^23 rounds to whole numbers
    Floats inside = x < LOWEST ? broadcast(LOWEST) : x;
    inside = inside > HIGHEST ? broadcast(HIGHEST) : inside;
    Floats shifted = inside * 1.44269504088896341f + ROUND;
    Floats n = shifted - ROUND;
    Floats r = inside - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    // 2^n as 2^(n−1)·2: n may be 128.
    Ints power = (reinterpret_cast<Ints>(shifted) - 0x4b400000 + 126) << 23;
    Floats result = p * reinterpret_cast<Floats>(power) * 2.0f;
    result = x < LOWEST ? Floats{} : result;
    return x > HIGHEST ? broadcast(INFINITY) : result;
}

// result[i] = e^(x[i] − the largest of x): gives the largest and the sum, in one order.
struct Exponentials {
    float largest, sum;
};

inline Exponentials exponentials(const float* x, int64_t count, float* result) {
    Floats most = broadcast(x[0]), sums{};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) most = greater(load(x + i), most);
    float highest = largest(most);
    for (; i < count; i++) highest = x[i] > highest ? x[i] : highest;
    for (i = 0; i < count; i += LANES) {
        store_first(result + i, exponential(load_first(x + i, count - i) - highest), count - i);
        sums += load_first(result + i, count - i);
    }
    return {highest, sum(sums)};
}
