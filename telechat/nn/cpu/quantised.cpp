#include "quantised.h"

namespace {

template <typename Kind>
void dequantise(const uint8_t* rows, const float* scales, int64_t groups, int64_t inputs, int64_t count, float* result) {
    const int64_t group = inputs / groups, bytes = Kind::row_bytes(inputs);
    for (int64_t row = 0; row < count; row++, rows += bytes, result += inputs)
        for (int64_t g = 0; g < groups; g++) {
            const Floats factor = Kind::factor(*scales++);
            for (int64_t i = g * group; i < (g + 1) * group; i += LANES) store(result + i, Kind::values(rows, i, factor));
        }
}

}  // namespace

void dequantise_rows(const void* packed, const Quantisation& how, int64_t inputs, int64_t first, int64_t count,
                     float* result) {
    const int64_t bytes = how.bits == 8 ? EightBits::row_bytes(inputs) : FourBits::row_bytes(inputs);
    const auto by = how.bits == 8 ? dequantise<EightBits> : dequantise<FourBits>;
    by(static_cast<const uint8_t*>(packed) + first * bytes, how.scales + first * how.groups, how.groups, inputs, count, result);
}

void reorder(const float* x, int64_t rows, int64_t inputs, const int32_t* order, float* result) {
    for (int64_t row = 0; row < rows; row++, x += inputs, result += inputs)
        for (int64_t i = 0; i < inputs; i++) result[i] = x[order[i]];
}
