// Waiting threads look for work for some microseconds before they sleep: an operator's phases follow each other
// closely, and waking a thread takes longer than a phase. OpenMP would make a second team for each thread of
// MindSpore's that calls a graph.
#include "pool.h"

#include <pthread.h>

#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int LOOKS = 4000;  // before a thread sleeps, some 40 to 100 µs

class Pool {
public:
    explicit Pool(int threads) {
        for (int i = 1; i < threads; i++) std::thread([this] { work(); }).detach();
        threads_ = threads;
    }

    int threads() const { return threads_; }

    void run(int64_t count, void (*call)(void*, int64_t), void* task) {
        std::lock_guard<std::mutex> one_at_a_time(callers_);
        call_ = call;
        task_ = task;
        count_ = count;
        next_.store(0, std::memory_order_relaxed);
        open_.store(true);
        generation_.fetch_add(1);
        if (sleeping_.load() > 0) {
            std::lock_guard<std::mutex> lock(sleepers_);
            wake_.notify_all();
        }
        take();
        open_.store(false);  // who wakes up only now comes too late, and nobody waits for it
        for (int looks = 0; looks < LOOKS; looks++) {
            if (inside_.load() == 0) return;
            pause_briefly();
        }
        // The core is for whoever keeps the others from ending.
        std::unique_lock<std::mutex> lock(sleepers_);
        done_.wait(lock, [&] { return inside_.load() == 0; });
    }

private:
    void take() {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) call_(task_, i);
    }

    [[noreturn]] void work() {
        uint64_t seen = 0;
        while (true) {
            for (int looks = 0; generation_.load(std::memory_order_acquire) == seen; looks++) {
                if (looks < LOOKS) {
                    pause_briefly();
                    continue;
                }
                std::unique_lock<std::mutex> lock(sleepers_);
                sleeping_.fetch_add(1);
                wake_.wait(lock, [&] { return generation_.load() != seen; });
                sleeping_.fetch_sub(1);
            }
            seen = generation_.load(std::memory_order_acquire);
            inside_.fetch_add(1);  // before the look at `open_`, as run() closes before it looks for who is inside
            if (open_.load()) take();
            if (inside_.fetch_sub(1) == 1 && !open_.load()) {
                std::lock_guard<std::mutex> lock(sleepers_);
                done_.notify_one();
            }
        }
    }

    int threads_;
    std::mutex callers_, sleepers_;
    std::condition_variable wake_, done_;
    std::atomic<int> sleeping_{0}, inside_{0};
    std::atomic<bool> open_{false};
    std::atomic<uint64_t> generation_{0};
    std::atomic<int64_t> next_{0};
    void (*call_)(void*, int64_t) = nullptr;
    void* task_ = nullptr;
    int64_t count_ = 0;
};

Pool* pool = nullptr;
int wanted = 1;
std::mutex making;

Pool& the_pool() {
    std::lock_guard<std::mutex> lock(making);
    static const int forgotten = pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });  // a child has no threads
    static_cast<void>(forgotten);
    if (pool == nullptr || pool->threads() != wanted) pool = new Pool(wanted);  // a replaced pool's threads sleep on
    return *pool;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void set_thread_count(int threads) { wanted = threads < 1 ? 1 : threads; }

int thread_count() { return wanted; }

void run_parallel(int64_t count, void (*call)(void*, int64_t), void* task) {
    if (count <= 1 || wanted == 1) {
        for (int64_t i = 0; i < count; i++) call(task, i);
        return;
    }
    the_pool().run(count, call, task);
}

float* scratch(int slot, int64_t floats) {
    struct Memory {
        void* start = nullptr;
        int64_t floats = 0;
        ~Memory() { std::free(start); }
    };
    thread_local std::vector<std::unique_ptr<Memory>> memories;
    while (static_cast<int>(memories.size()) <= slot) memories.push_back(std::make_unique<Memory>());
    Memory& memory = *memories[slot];
    if (memory.floats < floats) {
        std::free(memory.start);
        memory.floats = (floats + 15) / 16 * 16;
        memory.start = std::aligned_alloc(64, memory.floats * sizeof(float));
    }
    return static_cast<float*>(memory.start);
}
