// A call of HCCL in the making: which bytes go to which rank, and how it gets into the stream.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>

#include "groups.h"

namespace sim::hccl {

using Counts = std::vector<uint64_t>;

inline DType type_of(int hccl) {
  static const DType types[] = {INT8, INT16, INT32, FLOAT16, FLOAT32, INT64, UINT64, UINT8, UINT16, UINT32, FLOAT64,
                                BFLOAT16};
  if (hccl < 0 || hccl >= 12) fail("HCCL: no data type %d", hccl);
  return types[hccl];
}

// The bytes for and from each rank of the group, this one included.
struct Exchange {
  explicit Exchange(int size) : out(size), in(size), out_bytes(size), in_bytes(size), room(size) {}
  std::vector<const void *> out;
  std::vector<void *> in;
  Counts out_bytes, in_bytes;
  std::vector<std::vector<char>> room;

  void send(int peer, const void *data, uint64_t bytes) {
    out[peer] = data;
    out_bytes[peer] = bytes;
  }
  void receive(int peer, void *data, uint64_t bytes) {
    in[peer] = data;
    in_bytes[peer] = bytes;
  }
  void receive_aside(int peer, uint64_t bytes) {  // memory of this call
    room[peer].resize(bytes);
    receive(peer, room[peer].data(), bytes);
  }
  void run(Communicator &group, const Call &call) {
    std::vector<Part> parts;
    for (int peer = 0; peer < group.size; ++peer) {
      if (peer == group.rank) {
        if (in_bytes[peer] > 0) memmove(in[peer], out[peer], in_bytes[peer]);
      } else {
        parts.push_back({peer, out[peer], out_bytes[peer], in[peer], in_bytes[peer]});
      }
    }
    group.run(call, parts);
  }
  std::vector<const void *> received() const { return {in.begin(), in.end()}; }
};

inline char *at(const Tensor &tensor, uint64_t element) {
  return static_cast<char *>(tensor.data) + element * size_of(tensor.type);
}

// Queues a collective: `work` fills the exchange from the tensors and may use what it received.
using Work = std::function<void(Communicator &, Exchange &, const Call &, const Tensors &)>;
inline void queue(void *comm, void *stream, const char *name, const Call &what, const Tensors &tensors, Work work) {
  Communicator &group = communicator(comm);
  const std::string settings = format("group %s, rank %d of %d", group.name.c_str(), group.rank, group.size);
  launch(stream, name, tensors, settings, [comm, what, work](const Tensors &t) {
    Communicator &group = communicator(comm);
    Exchange exchange(group.size);
    work(group, exchange, what, t);
  });
}

inline Counts counts_of(const void *counts, int size) {
  const auto *first = static_cast<const uint64_t *>(counts);
  return Counts(first, first + size);
}

inline int64_t reach(const Counts &counts, const Counts &offsets) {  // elements that a buffer must have
  uint64_t end = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] > 0) end = std::max(end, offsets[i] + counts[i]);
  }
  return end;
}

inline Counts offsets_of(const Counts &counts) {
  Counts offsets(counts.size());
  for (size_t i = 1; i < counts.size(); ++i) offsets[i] = offsets[i - 1] + counts[i - 1];
  return offsets;
}

}  // namespace sim::hccl
