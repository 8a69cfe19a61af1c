// Groups of ranks: HCCL's calls that make and destroy communicators and ask about them.
#include "groups.h"

#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <set>

#include "../runtime/memory.h"

namespace sim::hccl {
namespace {

constexpr size_t ROOT_INFO_BYTES = 4108, NAME_BYTES = 128;
constexpr uint32_t NOT_SET = 0xffffffff, DEFAULT_BUFFER = 200;  // MB

// HcclCommConfig as far as it is read here; later versions only add to its end.
struct Config {
  char information[24];
  uint32_t buffer_size;  // MB
  uint32_t deterministic;
  char name[NAME_BYTES];
};

std::mutex lock;
std::set<void *> live;

// A group takes two buffers, to send from and to receive in, of HCCL_BUFFSIZE MB.
size_t buffer_bytes(const Config *config) {
  const char *variable = getenv("HCCL_BUFFSIZE");
  size_t megabytes = variable == nullptr ? DEFAULT_BUFFER : strtoul(variable, nullptr, 10);
  if (config != nullptr && config->buffer_size != NOT_SET) megabytes = config->buffer_size;
  return 2 * megabytes << 20;
}

}  // namespace

Communicator &communicator(void *comm) {
  std::lock_guard<std::mutex> hold(lock);
  if (live.count(comm) == 0) fail("HCCL: %p is not a communicator, or was destroyed", comm);
  return *static_cast<Communicator *>(comm);
}

}  // namespace sim::hccl

using namespace sim;
using namespace sim::hccl;

extern "C" {

// The first rank of a group makes it up and MindSpore hands it to the others: here a name that no other group has.
int HcclGetRootInfo(void *info) {
  static std::atomic<int> count{0};
  memset(info, 0, ROOT_INFO_BYTES);
  snprintf(static_cast<char *>(info), ROOT_INFO_BYTES, "simulated-hccl-%d-%d-%lx", getpid(), count++,
           static_cast<unsigned long>(random()));
  return 0;
}

int HcclCommInitRootInfoConfig(uint32_t size, const void *info, uint32_t rank, const void *configuration, void **comm) {
  return status([&] {
    const auto *config = static_cast<const Config *>(configuration);
    const std::string identifier(static_cast<const char *>(info));
    std::string name = config == nullptr ? "" : std::string(config->name, strnlen(config->name, NAME_BYTES));
    if (name.empty()) name = identifier;
    auto *made = new Communicator(identifier, name, rank, size);
    made->buffer = memory::allocate(buffer_bytes(config));
    *comm = made;
    std::lock_guard<std::mutex> hold(lock);
    live.insert(made);
  });
}

int HcclCommInitRootInfo(uint32_t size, const void *info, uint32_t rank, void **comm) {
  return HcclCommInitRootInfoConfig(size, info, rank, nullptr, comm);
}

int HcclCommDestroy(void *comm) {
  return status([&] {
    Communicator *old = &communicator(comm);
    {
      std::lock_guard<std::mutex> hold(lock);
      live.erase(comm);
    }
    memory::release(old->buffer);
    delete old;
  });
}

int HcclGetRankId(void *comm, uint32_t *rank) {
  return status([&] { *rank = communicator(comm).rank; });
}

int HcclGetRankSize(void *comm, uint32_t *size) {
  return status([&] { *size = communicator(comm).size; });
}

int HcclGetCommName(void *comm, char *name) {
  return status([&] { snprintf(name, NAME_BYTES, "%s", communicator(comm).name.c_str()); });
}

// A failure is reported by the stream it happened in.
int HcclGetCommAsyncError(void *comm, int *error) {
  *error = 0;
  return 0;
}
const char *HcclGetErrorString(int code) { return code == 0 ? "no error" : "see the simulator's message"; }

uint32_t HcclGetCommConfigCapability() { return 4; }  // buffer size, determinism, name, expansion mode

int HcclCommInitClusterInfo(const char *table, uint32_t rank, void **comm) {
  return status([&] { fail("HCCL: rank tables are not simulated; start the ranks with msrun"); });
}
int HcclCommInitClusterInfoConfig(const char *table, uint32_t rank, void *config, void **comm) {
  return HcclCommInitClusterInfo(table, rank, comm);
}
int HcclCreateSubCommConfig(void **whole, uint32_t size, uint32_t *ranks, uint64_t id, uint32_t rank, void *config,
                            void **comm) {
  return HcclCommInitClusterInfo(nullptr, rank, comm);
}
}
