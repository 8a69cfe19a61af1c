// Copies between host and device, and memory's entry points.
//
// aclrtMemcpyAsync from page-locked memory reads when the stream comes to it; from other memory the bytes are taken at
// the call, as the driver does. A copy to the host arrives when the stream comes to it: reading before a
// synchronisation gives old values.
#include <cstring>
#include <memory>

#include "runtime/log.h"
#include "runtime/memory.h"
#include "runtime/stream.h"
#include "sim.h"

namespace sim {
namespace {
enum Kind { HOST_TO_HOST = 0, HOST_TO_DEVICE = 1, DEVICE_TO_HOST = 2, DEVICE_TO_DEVICE = 3, DEFAULT = 4 };
constexpr const char *KINDS[] = {"host to host", "host to device", "device to host", "device to device"};

Kind kind_of(const void *to, const void *from, int32_t given, const char *call) {
  bool to_device = memory::is_device(to), from_device = memory::is_device(from);
  Kind kind = to_device ? (from_device ? DEVICE_TO_DEVICE : HOST_TO_DEVICE) : (from_device ? DEVICE_TO_HOST : HOST_TO_HOST);
  if (given >= HOST_TO_HOST && given <= DEVICE_TO_DEVICE && given != kind)
    fail("%s was told to copy %s, but %p to %p is %s", call, KINDS[given], from, to, KINDS[kind]);
  return kind;
}

void *reachable(const void *address, size_t bytes, const char *what) {
  return memory::is_device(address) ? resolve(address, bytes, what) : const_cast<void *>(address);
}

void check(const char *call, size_t room, size_t bytes) {
  if (bytes > room) fail("%s of %zu bytes into %zu", call, bytes, room);
}
}  // namespace
}  // namespace sim

using namespace sim;
extern "C" {

int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int32_t given) {
  return guard([&] {
    check("aclrtMemcpy", room, bytes);
    check_device();
    Kind kind = kind_of(to, from, given, "aclrtMemcpy");
    log::event("copy", nullptr, KINDS[kind], bytes, "synchronous");
    memcpy(reachable(to, bytes, "aclrtMemcpy's destination"), reachable(from, bytes, "aclrtMemcpy's source"), bytes);
  });
}

int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int32_t given, void *stream) {
  return guard([&] {
    check("aclrtMemcpyAsync", room, bytes);
    Kind kind = kind_of(to, from, given, "aclrtMemcpyAsync");
    if (stream == nullptr) stream = default_stream();
    log::event("copy", stream, KINDS[kind], bytes, "");
    std::shared_ptr<char[]> taken;
    if (kind == HOST_TO_DEVICE && !memory::is_pinned(from)) {
      taken.reset(new char[bytes]);
      memcpy(taken.get(), from, bytes);
    }
    enqueue(stream, {"aclrtMemcpyAsync", [=] {
      const void *source = taken ? taken.get() : reachable(from, bytes, "aclrtMemcpyAsync's source");
      memcpy(reachable(to, bytes, "aclrtMemcpyAsync's destination"), source, bytes);
    }});
  });
}

int aclrtMemset(void *to, size_t room, int32_t value, size_t bytes) {
  return guard([&] {
    check("aclrtMemset", room, bytes);
    memset(reachable(to, bytes, "aclrtMemset"), value, bytes);
  });
}
int aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t bytes, void *stream) {
  return guard([&] {
    check("aclrtMemsetAsync", room, bytes);
    launch(stream, "aclrtMemsetAsync", std::to_string(bytes) + " bytes",
           [=] { memset(reachable(to, bytes, "aclrtMemsetAsync"), value, bytes); });
  });
}

int aclrtMalloc(void **address, size_t bytes, int32_t policy) {
  return guard([&] { *address = memory::allocate(bytes); });
}
int aclrtMallocAlign32(void **address, size_t bytes, int32_t policy) { return aclrtMalloc(address, bytes, policy); }
int aclrtFree(void *address) {
  return guard([&] {
    drain();  // the card waits for what may still use it
    memory::release(address);
  });
}
int aclrtMallocHost(void **address, size_t bytes) {
  return guard([&] { *address = memory::allocate_pinned(bytes); });
}
int aclrtFreeHost(void *address) {
  return guard([&] { memory::release_pinned(address); });
}
int aclrtGetMemInfo(int32_t kind, size_t *free, size_t *total) {
  return guard([&] {
    memory::Usage usage = memory::usage();
    *total = usage.limit;
    *free = usage.limit - usage.used;
  });
}

int aclrtReserveMemAddress(void **address, size_t bytes, size_t alignment, void *wanted, uint64_t flags) {
  return guard([&] { *address = memory::reserve(bytes); });
}
int aclrtReleaseMemAddress(void *address) {
  return guard([&] { memory::unreserve(address); });
}
int aclrtMallocPhysical(void **handle, size_t bytes, const void *properties, uint64_t flags) {
  return guard([&] { *handle = memory::allocate_physical(bytes); });
}
int aclrtFreePhysical(void *handle) {
  return guard([&] { memory::release_physical(static_cast<memory::Physical *>(handle)); });
}
int aclrtMapMem(void *address, size_t bytes, size_t offset, void *handle, uint64_t flags) {
  return guard([&] { memory::map(address, bytes, static_cast<memory::Physical *>(handle)); });
}
int aclrtUnmapMem(void *address) {
  return guard([&] { memory::unmap(address); });
}
}
