#include "runtime/memory.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <shared_mutex>

#include "runtime/log.h"
#include "runtime/stream.h"
#include "sim.h"

namespace sim::memory {

struct Physical {
  off_t offset;
  size_t bytes;
};

namespace {
constexpr uintptr_t RANGE = uintptr_t(1) << 40;    // addresses, not memory
constexpr uintptr_t DEVICE = uintptr_t(1) << 44;   // where the device's addresses are asked for
constexpr size_t PAGE = size_t(2) << 20;           // allocations are rounded up to the card's page
constexpr size_t POISON = size_t(8) << 20;

size_t round_up(size_t bytes) { return (std::max<size_t>(bytes, 1) + PAGE - 1) / PAGE * PAGE; }

size_t limit_from_environment() {
  const char *text = getenv("SIM_MEMORY");
  if (text == nullptr || *text == 0) return size_t(64) << 30;
  char *end = nullptr;
  double number = strtod(text, &end);
  std::string unit = end;
  double scale = unit == "GB" ? 0x1p30 : unit == "MB" ? 0x1p20 : unit == "KB" ? 0x1p10 : unit.empty() ? 1 : 0;
  if (scale == 0 || number <= 0) {
    fprintf(stderr, "simulator: SIM_MEMORY is %s; write a number and GB, MB or KB, such as 64GB\n", text);
    _exit(2);
  }
  return size_t(number * scale);
}

// What new memory reads as until it is written: not a number, in every floating type. (Zeros where operators do nothing.)
std::vector<char> poison(size_t bytes) { return std::vector<char>(bytes, operators_do_nothing() ? 0 : char(0xff)); }

int poison_file() {
  static const int file = [] {
    int fd = memfd_create("poison", MFD_CLOEXEC);
    const std::vector<char> pattern = poison(POISON);
    if (fd < 0 || ::write(fd, pattern.data(), POISON) != ssize_t(POISON)) fail("cannot make a file of poison");
    return fd;
  }();
  return file;
}

struct State {
  std::shared_mutex lock;
  uintptr_t device = 0, backing = 0;
  std::map<uintptr_t, size_t> taken;   // addresses in use: allocations and reservations
  std::map<uintptr_t, size_t> live;    // readable pieces: allocations and mappings
  std::map<uintptr_t, size_t> asked;   // allocations: bytes asked for
  std::map<uintptr_t, size_t> pinned;
  uintptr_t next = 0;
  size_t used = 0, peak = 0, limit = limit_from_environment();
  int physical_file = -1;
  off_t physical_end = 0;
  std::multimap<size_t, off_t> free_physical;

  State() {
    auto reserve_range = [](uintptr_t where) {
      void *p = mmap(reinterpret_cast<void *>(where), RANGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) fail("cannot reserve 1 TB of addresses for the device (is ulimit -v set?)");
      return reinterpret_cast<uintptr_t>(p);
    };
    device = reserve_range(DEVICE);
    backing = reserve_range(DEVICE * 2);
  }

  bool is_pinned(uintptr_t address) {
    auto it = pinned.upper_bound(address);
    return it != pinned.begin() && address < std::prev(it)->first + std::prev(it)->second;
  }
  uintptr_t find_addresses(size_t bytes) {
    // Going forward always: an address is not used again soon, so that a use after free is seen.
    for (int pass = 0; pass < 2; ++pass) {
      uintptr_t at = device + next;
      for (auto it = taken.lower_bound(at); it != taken.end() && it->first < at + bytes; ++it) at = it->first + it->second;
      if (at + bytes <= device + RANGE) {
        next = at + bytes - device;
        taken[at] = bytes;
        return at;
      }
      next = 0;
    }
    fail("no addresses are left for %zu bytes of device memory", bytes);
  }
  void count(size_t bytes) {
    if (used + bytes > limit)
      throw Error(MEMORY_FULL, format("the device is out of memory: %zu bytes asked for, %zu of %zu in use (SIM_MEMORY)",
                                      bytes, used, limit));
    used += bytes;
    peak = std::max(peak, used);
  }
  void *backing_of(uintptr_t address) { return reinterpret_cast<void *>(address - device + backing); }
  void unmap_backing(uintptr_t address, size_t bytes) {
    mmap(backing_of(address), bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  }
};
State &state() {
  static State &s = *new State;  // threads may still use it while the process ends
  return s;
}
uintptr_t number(const void *address) { return reinterpret_cast<uintptr_t>(address); }
}  // namespace

bool is_device(const void *address) {
  State &s = state();
  return number(address) >= s.device && number(address) < s.device + RANGE;
}

void *allocate(size_t bytes) {
  State &s = state();
  size_t rounded = round_up(bytes);
  std::unique_lock hold(s.lock);
  s.count(rounded);
  uintptr_t at = s.find_addresses(rounded);
  for (size_t done = 0; done < rounded; done += POISON) {
    void *p = mmap(s.backing_of(at + done), std::min(POISON, rounded - done), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE,
                   poison_file(), 0);
    if (p == MAP_FAILED) fail("the host cannot map %zu bytes for the device", rounded);
  }
  s.live[at] = rounded;
  s.asked[at] = bytes;
  log::event("allocate", nullptr, "device", bytes, "");
  return reinterpret_cast<void *>(at);
}

void release(void *address) {
  State &s = state();
  std::unique_lock hold(s.lock);
  auto it = s.asked.find(number(address));
  if (it == s.asked.end()) fail("aclrtFree of %p: %s, and no allocation begins there", address, describe(address).c_str());
  size_t bytes = round_up(it->second);
  s.unmap_backing(it->first, bytes);
  s.live.erase(it->first);
  s.taken.erase(it->first);
  s.used -= bytes;
  log::event("free", nullptr, "device", it->second, "");
  s.asked.erase(it);
}

Usage usage() {
  State &s = state();
  std::shared_lock hold(s.lock);
  return {s.used, s.peak, s.limit};
}

std::string describe(const void *address) {  // under the lock
  if (address == nullptr) return "a null pointer";
  if (!is_device(address)) return state().is_pinned(number(address)) ? "page-locked host memory" : "host memory";
  State &s = state();
  return number(address) < s.device + s.next ? "device memory that has been freed or unmapped, or lies past an end"
                                             : "a device address that was never allocated";
}

void *reserve(size_t bytes) {
  std::unique_lock hold(state().lock);
  return reinterpret_cast<void *>(state().find_addresses(round_up(bytes)));
}

void unreserve(void *address) {
  std::unique_lock hold(state().lock);
  if (state().taken.erase(number(address)) == 0) fail("aclrtReleaseMemAddress of %p, which was not reserved", address);
}

Physical *allocate_physical(size_t bytes) {
  State &s = state();
  bytes = round_up(bytes);
  std::unique_lock hold(s.lock);
  s.count(bytes);
  if (s.physical_file < 0) s.physical_file = memfd_create("physical", MFD_CLOEXEC);
  off_t offset = s.physical_end;
  auto it = s.free_physical.find(bytes);
  if (it != s.free_physical.end()) {
    offset = it->second;
    s.free_physical.erase(it);
  } else {
    s.physical_end += bytes;
    if (ftruncate(s.physical_file, s.physical_end) != 0) fail("the host has no memory for %zu bytes of the device", bytes);
  }
  const std::vector<char> pattern = poison(PAGE);
  for (size_t done = 0; done < bytes; done += PAGE)
    if (pwrite(s.physical_file, pattern.data(), PAGE, offset + done) != ssize_t(PAGE))
      fail("the host has no memory for %zu bytes of the device", bytes);
  log::event("allocate", nullptr, "physical", bytes, "");
  return new Physical{offset, bytes};
}

void release_physical(Physical *physical) {
  State &s = state();
  std::unique_lock hold(s.lock);
  fallocate(s.physical_file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, physical->offset, physical->bytes);
  s.free_physical.emplace(physical->bytes, physical->offset);
  s.used -= physical->bytes;
  log::event("free", nullptr, "physical", physical->bytes, "");
  delete physical;
}

void map(void *address, size_t bytes, Physical *physical) {
  State &s = state();
  std::unique_lock hold(s.lock);
  if (!is_device(address) || bytes > physical->bytes) fail("aclrtMapMem of %zu bytes at %p: %s", bytes, address, describe(address).c_str());
  mmap(s.backing_of(number(address)), bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE,
       s.physical_file, physical->offset);
  s.live[number(address)] = bytes;
}

void unmap(void *address) {
  State &s = state();
  std::unique_lock hold(s.lock);
  auto it = s.live.find(number(address));
  if (it == s.live.end()) fail("aclrtUnmapMem of %p: %s", address, describe(address).c_str());
  s.unmap_backing(it->first, it->second);
  s.live.erase(it);
}

void *allocate_pinned(size_t bytes) {
  void *address = nullptr;
  if (posix_memalign(&address, 64, std::max<size_t>(bytes, 1)) != 0) fail("the host is out of memory for %zu bytes", bytes);
  std::unique_lock hold(state().lock);
  state().pinned[number(address)] = bytes;
  return address;
}

void release_pinned(void *address) {
  {
    std::unique_lock hold(state().lock);
    if (state().pinned.erase(number(address)) == 0) fail("aclrtFreeHost of %p, which aclrtMallocHost did not give", address);
  }
  free(address);
}

bool is_pinned(const void *address) {
  std::shared_lock hold(state().lock);
  return state().is_pinned(number(address));
}

namespace {
struct sigaction before;
void on_fault(int signal, siginfo_t *info, void *context) {
  if (is_device(info->si_addr)) {
    static const char message[] =
        "simulator: the host read or wrote device memory without a copy: on a card this process ends here\n";
    if (::write(2, message, sizeof(message) - 1) < 0) _exit(2);
  }
  sigaction(signal, &before, nullptr);  // the instruction faults again, for whoever was asked before
}
}  // namespace

void watch_for_faults() {
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &before);
}

}  // namespace sim::memory

namespace sim {
void *resolve(const void *address, size_t bytes, const std::string &what) {
  auto &s = memory::state();
  uintptr_t at = memory::number(address);
  std::shared_lock hold(s.lock);
  for (uintptr_t covered = at; bytes > 0;) {  // mappings beside each other are one piece
    auto it = s.live.upper_bound(covered);
    if (it == s.live.begin() || (--it)->first + it->second <= covered)
      fail("%s: %zu bytes at %p are wanted, but at byte %zu there is %s", what.c_str(), bytes, address,
           size_t(covered - at), memory::describe(reinterpret_cast<void *>(covered)).c_str());
    covered = it->first + it->second;
    if (covered >= at + bytes) break;
  }
  if (bytes == 0 && !memory::is_device(address)) return nullptr;
  return s.backing_of(at);
}
}  // namespace sim
