// The threads that all operators share: the caller and as many others as the process may use cores.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "vector.h"

// Calls task(i) for each i below `count`, each by one thread, in any order; returns when all are done.
// A result that is to be the same for any number of threads must not depend on which calls share a thread.
void run_parallel(int64_t count, void (*call)(void*, int64_t), void* task);

template <typename Task>
void parallel(int64_t count, const Task& task) {
    run_parallel(count, [](void* context, int64_t i) { (*static_cast<const Task*>(context))(i); },
                 const_cast<Task*>(&task));
}

// The same for stretches of up to `size` of a whole: task(first, count).
template <typename Task>
void parallel_stretches(int64_t whole, int64_t size, const Task& task) {
    parallel((whole + size - 1) / size, [&](int64_t i) { task(i * size, std::min(size, whole - i * size)); });
}

constexpr int64_t ELEMENTS = 1 << 14;  // that a thread takes at a time of what goes through memory once

// The same for the vectors of such elements: call(first element, how many are left).
template <typename Call>
void by_vectors(int64_t elements, const Call& call) {
    parallel_stretches(elements, ELEMENTS, [&](int64_t first, int64_t count) {
        for (int64_t i = 0; i < count; i += LANES) call(first + i, count - i);
    });
}

// What a thread does that looks for work and finds none.
inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

int thread_count();

// Memory of the calling thread that lasts until its next call with the same `slot`; 64-byte aligned.
float* scratch(int slot, int64_t floats);
