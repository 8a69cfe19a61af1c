// Device memory: addresses that the host cannot read, what is allocated there, and how much of it.
//
// A device address lies in a range of its own that is never readable. The bytes themselves are kept a fixed distance
// away ("backing"), where only operators and copies reach them, through resolve(). A host pointer is never in the range;
// a host that reads a device address faults, and is told so.
#pragma once
#include <cstddef>
#include <string>

namespace sim::memory {

void *allocate(size_t bytes);  // fails with MEMORY_FULL beyond SIM_MEMORY
void release(void *address);   // fails if no allocation begins there
bool is_device(const void *address);
std::string describe(const void *address);  // "device memory that was freed", "host memory", …

struct Usage {
  size_t used, peak, limit;
};
Usage usage();

// Virtual memory management: addresses and physical memory apart, mapped to each other by the caller.
void *reserve(size_t bytes);
void unreserve(void *address);
struct Physical;
Physical *allocate_physical(size_t bytes);
void release_physical(Physical *physical);
void map(void *address, size_t bytes, Physical *physical);
void unmap(void *address);

// Memory of the host that aclrtMallocHost gave: only from it may a copy read after the call has returned.
void *allocate_pinned(size_t bytes);
void release_pinned(void *address);
bool is_pinned(const void *address);

void watch_for_faults();  // from now on a fault at a device address says what happened

}  // namespace sim::memory
