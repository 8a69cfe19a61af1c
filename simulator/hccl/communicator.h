// A group of ranks and the connections between its processes: how the collectives move bytes and find out that ranks
// disagree.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "../sim.h"

namespace sim::hccl {

// What a rank says of its call to the others before any data moves. Those who take part must say the same.
struct Call {
  char name[24];
  int32_t type = UNDEFINED;   // DType
  int32_t reduction = -1;     // HcclReduceOp
  int32_t root = -1;
  uint64_t count = 0;         // elements that a rank gives, where that is the same for all
  uint64_t sends = 0;         // bytes for the rank that reads this
  uint64_t expects = 0;       // bytes from it
};
Call call(const char *name, DType type, uint64_t count, int reduction = -1, int root = -1);
std::string text(const Call &call);

// The bytes of one call that go to a peer and come from it.
struct Part {
  int peer;
  const void *out = nullptr;
  uint64_t out_bytes = 0;
  void *in = nullptr;
  uint64_t in_bytes = 0;
};

class Communicator {
 public:
  // Joins the ranks that call with the same identifier; returns when all are there. Fails after HCCL_CONNECT_TIMEOUT.
  Communicator(const std::string &identifier, const std::string &name, int rank, int size);
  ~Communicator();

  // Tells each part's peer of the call, checks that it makes the same, then moves the data, both ways at once. Fails if
  // a peer makes another call, has gone, or does not come within HCCL_EXEC_TIMEOUT seconds; from then on always.
  void run(const Call &mine, const std::vector<Part> &parts);
  void check_peer(int64_t peer, const char *what) const;

  const std::string name;
  const int rank, size;
  void *buffer = nullptr;  // what HCCL takes of the device's memory for a group

 private:
  void connect(const std::string &identifier);
  void exchange(const std::string &what, const std::vector<Part> &parts);
  [[noreturn]] void give_up(const std::string &why);
  std::vector<int> sockets_;  // by peer
  std::mutex mutex_;          // a group's calls go one after the other
  std::string failure_;
};

}  // namespace sim::hccl
