#include "rows.h"

#include <algorithm>

#include "pool.h"

namespace {

constexpr int64_t FEW = 12;  // rows of x, up to which a weight is best read as it lies
constexpr int64_t AHEAD = 1 << 13;  // bytes of a weight that are on their way while others are multiplied
constexpr int64_t LINE_BYTES = 64, FLOATS = LINE_BYTES / sizeof(float);  // of a line of memory

// How a row of numbers is read, as of `EightBits` with no scale.
template <typename T>
struct Plain {
    static constexpr bool QUANTISED = false;
    static constexpr int64_t LINE = LINE_BYTES / sizeof(T);
    static int64_t row_bytes(int64_t inputs) { return inputs * sizeof(T); }
    static Floats factor(float) { return Floats{}; }
    static Floats values(const uint8_t* row, uint64_t i, Floats) { return load(reinterpret_cast<const T*>(row) + i); }
    static Floats first_values(const uint8_t* row, int64_t i, int64_t count) {
        return load_first(reinterpret_cast<const T*>(row) + i, count);
    }
};

// Rows of a weight that lie one behind the other, and their scales.
template <typename Kind>
struct Rows {
    const uint8_t* data;
    const float* scales;
    int64_t inputs, groups, group = inputs / groups, bytes = Kind::row_bytes(inputs);

    Rows from(int64_t row) const { return {data + row * bytes, scales + row * groups, inputs, groups, group, bytes}; }
    Floats factor(int64_t row, int64_t g) const { return Kind::factor(Kind::QUANTISED ? scales[row * groups + g] : 1.0f); }
    // A vector of a row, 0 behind its end; g: the group of input i.
    Floats vector(int64_t row, int64_t i, int64_t g) const {
        if constexpr (Kind::QUANTISED) return Kind::values(data + row * bytes, i, factor(row, g));
        else return Kind::first_values(data + row * bytes, i, inputs - i);
    }
};

// R outputs of B rows of x at a time: so many sums keep the memory busy, and each x is used R times. The machine itself sees
// late that rows go on: what comes is asked for in the order in which it lies, or, of floats, when the rows before are read.
template <int R, int B, typename Kind>
void tile(const float* x, const Rows<Kind>& weight, float* result, int64_t stride) {
    const int64_t inputs = weight.inputs, bytes = weight.bytes;
    const uint8_t* const ahead = weight.data + std::max<int64_t>(1, AHEAD / (R * bytes)) * R * bytes;
    Floats sums[B][R] = {};
    for (int64_t g = 0, end = weight.group; g < weight.groups; g++, end += weight.group) {
        Floats factor[R];
        for (int r = 0; r < R; r++) factor[r] = weight.factor(r, g);
        const auto step = [&](int64_t i) __attribute__((always_inline)) {
            Floats part[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                part[r] = Kind::values(weight.data + r * bytes, i, factor[r]);
                if (Kind::LINE == FLOATS) __builtin_prefetch(weight.data + (r + R) * bytes + i * sizeof(float));
            }
#pragma GCC unroll 4
            for (int b = 0; b < B; b++) {
                const Floats own = load(x + b * inputs + i);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) sums[b][r] += own * part[r];
            }
        };
        int64_t i = end - weight.group;
        if (Kind::LINE > FLOATS && i % CHUNK == 0)  // shifts are known then
            for (; i + static_cast<int64_t>(CHUNK) <= end; i += CHUNK) {
                const int64_t chunk = i / CHUNK;
#pragma GCC unroll 32
                for (int64_t k = 0; k < static_cast<int64_t>(CHUNK); k += LANES) {
                    for (int r = 0; k % Kind::LINE == 0 && r < R; r++)
                        __builtin_prefetch(ahead + ((chunk * CHUNK + k) / Kind::LINE * R + r) * LINE_BYTES, 0, 0);
                    step(chunk * CHUNK + k);
                }
            }
        for (; i + LANES <= end; i += LANES) step(i);
        if constexpr (!Kind::QUANTISED)
            for (int b = 0; i < end && b < B; b++)
                for (int r = 0; r < R; r++) sums[b][r] += load_first(x + b * inputs + i, end - i) * weight.vector(r, i, g);
    }
    for (int b = 0; b < B; b++)
        for (int r = 0; r < R; r++) result[b * stride + r] = sum(sums[b][r]);
}

template <int R, typename Kind>
void rows_of(const float* x, int64_t batch, const Rows<Kind>& weight, float* result, int64_t stride) {
    for (; batch >= 4; batch -= 4, x += 4 * weight.inputs, result += 4 * stride) tile<R, 4>(x, weight, result, stride);
    if (batch == 3) tile<R, 3>(x, weight, result, stride);
    if (batch == 2) tile<R, 2>(x, weight, result, stride);
    if (batch == 1) tile<R, 1>(x, weight, result, stride);
}

template <typename Kind>
void few_rows(const float* x, int64_t batch, const Rows<Kind>& weight, int64_t count, float* result, int64_t stride) {
    int64_t row = 0;
    for (; row + 4 <= count; row += 4) rows_of<4>(x, batch, weight.from(row), result + row, stride);
    for (; row < count; row++) rows_of<1>(x, batch, weight.from(row), result + row, stride);
}

// Many rows: the same sums in the same order, with both factors copied to where what is read together lies together.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int OUTPUTS = 4, INPUTS = 2;  // of a tile, whose sums are in registers
#else
constexpr int OUTPUTS = 4, INPUTS = 6;
#endif
constexpr int64_t STEPS = 64;  // vectors along a row before the next tile's turn: what they meet stays in the first cache

// `height` rows (those from `count` on are 0), vector by vector of each.
template <int height, typename Kind>
void pack_tile(const Rows<Kind>& from, int64_t count, int64_t first, int64_t steps, float* to) {
    int64_t g = first * LANES / from.group;
    for (int64_t i = first * LANES; i < (first + steps) * LANES; i += LANES) {
        if (i == (g + 1) * from.group) g++;
        for (int64_t r = 0; r < height; r++, to += LANES) store(to, r < count ? from.vector(r, i, g) : Floats{});
    }
}

void add_tile(const float* x, const float* weight, int64_t steps, float* sums) {
    Floats part[INPUTS][OUTPUTS];
#pragma GCC unroll 6
    for (int b = 0; b < INPUTS; b++)
#pragma GCC unroll 4
        for (int r = 0; r < OUTPUTS; r++) part[b][r] = load(sums + (b * OUTPUTS + r) * LANES);
    for (int64_t i = 0; i < steps; i++, x += INPUTS * LANES, weight += OUTPUTS * LANES) {
        Floats row[OUTPUTS];
#pragma GCC unroll 4
        for (int r = 0; r < OUTPUTS; r++) row[r] = load(weight + r * LANES);
#pragma GCC unroll 6
        for (int b = 0; b < INPUTS; b++) {
            Floats factor = load(x + b * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < OUTPUTS; r++) part[b][r] += factor * row[r];
        }
    }
#pragma GCC unroll 6
    for (int b = 0; b < INPUTS; b++)
#pragma GCC unroll 4
        for (int r = 0; r < OUTPUTS; r++) store(sums + (b * OUTPUTS + r) * LANES, part[b][r]);
}

template <typename Kind>
void many_rows(const float* x, int64_t batch, const Rows<Kind>& weight, int64_t count, float* result, int64_t stride) {
    const int64_t vectors = (weight.inputs + LANES - 1) / LANES, tiles = (count + OUTPUTS - 1) / OUTPUTS;
    constexpr int64_t TILE = INPUTS * OUTPUTS * LANES, X_PART = STEPS * INPUTS * LANES;
    float* packed = scratch(7, tiles * OUTPUTS * vectors * LANES + X_PART + tiles * TILE);
    float *rows = packed + tiles * OUTPUTS * vectors * LANES, *sums = rows + X_PART;
    const Rows<Plain<float>> all{reinterpret_cast<const uint8_t*>(x), nullptr, weight.inputs, 1};
    for (int64_t tile = 0; tile < tiles; tile++)
        pack_tile<OUTPUTS>(weight.from(tile * OUTPUTS), count - tile * OUTPUTS, 0, vectors,
                           packed + tile * OUTPUTS * vectors * LANES);
    for (int64_t b = 0; b < batch; b += INPUTS) {
        std::fill(sums, sums + tiles * TILE, 0.0f);
        for (int64_t first = 0; first < vectors; first += STEPS) {
            const int64_t steps = std::min(STEPS, vectors - first);
            pack_tile<INPUTS>(all.from(b), batch - b, first, steps, rows);
            for (int64_t tile = 0; tile < tiles; tile++)
                add_tile(rows, packed + (tile * vectors + first) * OUTPUTS * LANES, steps, sums + tile * TILE);
        }
        for (int64_t row = b; row < std::min(batch, b + INPUTS); row++)
            for (int64_t o = 0; o < count; o++)
                result[row * stride + o] =
                    sum(load(sums + (o / OUTPUTS) * TILE + ((row - b) * OUTPUTS + o % OUTPUTS) * LANES));
    }
}

}  // namespace

void rows_product(const float* x, int64_t batch, int64_t inputs, Weight weight, int64_t first, int64_t count,
                  float* result, int64_t stride) {
    const Quantisation& how = weight.how;
    if (how.order != nullptr) {
        float* ordered = scratch(8, batch * inputs);
        reorder(x, batch, inputs, how.order, ordered);
        x = ordered;
    }
    const auto by = [&](auto kind, int64_t groups) {
        const Rows<decltype(kind)> rows{static_cast<const uint8_t*>(weight.data), how.scales, inputs, groups};
        (batch > FEW ? many_rows<decltype(kind)> : few_rows<decltype(kind)>)(x, batch, rows.from(first), count, result, stride);
    };
    if (how.scales != nullptr && how.bits == 8) by(EightBits{}, how.groups);
    else if (how.scales != nullptr) by(FourBits{}, how.groups);
    else if (weight.type == Type::float32) by(Plain<float>{}, 1);
    else by(Plain<bfloat16>{}, 1);
}

void rms_norm_rows(const float* x, int64_t rows, int64_t width, Weight weight, float epsilon, float* result) {
    for (int64_t row = 0; row < rows; row++, x += width, result += width) {
        Floats squares{};
        for (int64_t i = 0; i < width; i += LANES) {
            Floats part = load_first(x + i, width - i);
            squares += part * part;
        }
        const float root = inverse_root(sum(squares), width, epsilon);
        for (int64_t i = 0; i < width; i++) result[i] = x[i] * root * weight.at(i);
    }
}
