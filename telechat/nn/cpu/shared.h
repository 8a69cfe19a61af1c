// Sums over the processes of one host that share a model, through memory that they share.
#pragma once

#include <cstdint>

// The layout is that of decoding.py's ctypes structure.
struct Shared {
    void* memory;  // of `shared_bytes`, all 0 at first, the same for all; null: there is one process
    int64_t rank, processes;
};

// x[i] = Σ of all processes' x[i], in the processes' order, so that all get the same bits. All call it with one count.
void add_up(const Shared& shared, float* x, int64_t count);
