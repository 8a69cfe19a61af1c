// Dropout masks by Philox-4x32-10, as telechat/nn/dropout.py documents them.
#pragma once

#include <cstdint>

// A mask of `columns` columns. description: sequence, layer·2^16 + stream, step, the key's two words, and T.
struct Dropout {
    uint32_t counter[3], key[2], threshold;
    float scale;
    int64_t row_counters;

    Dropout(const int32_t* description, int64_t columns) : row_counters((columns + 7) / 8) {
        for (int i = 0; i < 3; i++) counter[i] = static_cast<uint32_t>(description[i]);
        for (int i = 0; i < 2; i++) key[i] = static_cast<uint32_t>(description[3 + i]);
        threshold = static_cast<uint32_t>(description[5]);
        scale = static_cast<float>(65536.0 / (65536.0 - threshold));
    }

    // Multiplies N values of a row, from a column on that is a multiple of 8, by their part of the mask.
    template <int N>
    void multiply(int64_t row, int64_t column, float* values) const {
        constexpr int COUNT = N / 8;
        static_assert(N % 8 == 0, "a counter makes eight values");
        uint32_t c0[COUNT], c1[COUNT], c2[COUNT], c3[COUNT];
        for (int i = 0; i < COUNT; i++) {
            c0[i] = static_cast<uint32_t>(row * row_counters + column / 8 + i);
            c1[i] = counter[0];
            c2[i] = counter[1];
            c3[i] = counter[2];
        }
        uint32_t k0 = key[0], k1 = key[1];
        for (int turn = 0; turn < 10; turn++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
            for (int i = 0; i < COUNT; i++) {
                const uint64_t first = static_cast<uint64_t>(c0[i]) * 0xD2511F53u;
                const uint64_t second = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
                c0[i] = static_cast<uint32_t>(second >> 32) ^ c1[i] ^ k0;
                c1[i] = static_cast<uint32_t>(second);
                c2[i] = static_cast<uint32_t>(first >> 32) ^ c3[i] ^ k1;
                c3[i] = static_cast<uint32_t>(first);
            }
        for (int i = 0; i < COUNT; i++) {
            const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
            for (int lane = 0; lane < 8; lane++) {
                const uint32_t half = (words[lane / 2] >> (lane % 2 * 16)) & 0xffffu;
                values[8 * i + lane] *= half >= threshold ? scale : 0.0f;
            }
        }
    }
};
