// HCCL's calls in which each pair of ranks exchanges pieces of its own size. Counts and offsets are elements, on the host.
#include <algorithm>

#include "exchange.h"

namespace sim::hccl {
namespace {

// Each pair of ranks exchanges pieces of its own size.
void all_to_all(const char *name, const void *send, const Counts &send_counts, const Counts &send_offsets, int send_type,
                const void *receive, const Counts &receive_counts, const Counts &receive_offsets, int receive_type,
                void *comm, void *stream) {
  const DType type = type_of(send_type);
  if (type_of(receive_type) != type) fail("%s: the dtypes of what is sent and received differ", name);
  const Tensors tensors = {make_tensor(type, {reach(send_counts, send_offsets)}, const_cast<void *>(send)),
                           make_tensor(type, {reach(receive_counts, receive_offsets)}, const_cast<void *>(receive))};
  queue(comm, stream, name, call(name + 4, type, 0), tensors,
        [=](Communicator &group, Exchange &exchange, const Call &what, const Tensors &t) {
          for (int peer = 0; peer < group.size; ++peer) {
            exchange.send(peer, at(t[0], send_offsets[peer]), send_counts[peer] * size_of(type));
            exchange.receive(peer, at(t[1], receive_offsets[peer]), receive_counts[peer] * size_of(type));
          }
          exchange.run(group, what);
        });
}

}  // namespace
}  // namespace sim::hccl

using namespace sim;
using namespace sim::hccl;

extern "C" {

int HcclAllGatherV(void *send, uint64_t count, void *receive, const void *counts, const void *offsets, int type,
                   void *comm, void *stream) {
  return status([&] {
    const DType t = type_of(type);
    const int size = communicator(comm).size;
    const Counts parts = counts_of(counts, size), places = counts_of(offsets, size);
    queue(comm, stream, "HcclAllGatherV", call("AllGatherV", t, 0),
          {make_tensor(t, {int64_t(count)}, send), make_tensor(t, {reach(parts, places)}, receive)},
          [=](Communicator &group, Exchange &exchange, const Call &what, const Tensors &t) {
            for (int peer = 0; peer < group.size; ++peer) {
              exchange.send(peer, t[0].data, count * size_of(t[0].type));
              exchange.receive(peer, at(t[1], places[peer]), parts[peer] * size_of(t[0].type));
            }
            exchange.run(group, what);
          });
  });
}

int HcclAlltoAllV(const void *send, const void *send_counts, const void *send_offsets, int send_type,
                  const void *receive, const void *receive_counts, const void *receive_offsets, int receive_type,
                  void *comm, void *stream) {
  return status([&] {
    const int size = communicator(comm).size;
    all_to_all("HcclAlltoAllV", send, counts_of(send_counts, size), counts_of(send_offsets, size), send_type, receive,
               counts_of(receive_counts, size), counts_of(receive_offsets, size), receive_type, comm, stream);
  });
}

int HcclAlltoAllVC(const void *send, const void *matrix, int send_type, const void *receive, int receive_type, void *comm,
                   void *stream) {
  return status([&] {
    const Communicator &group = communicator(comm);
    const Counts all = counts_of(matrix, group.size * group.size);
    Counts sends, receives;
    for (int peer = 0; peer < group.size; ++peer) {
      sends.push_back(all[group.rank * group.size + peer]);
      receives.push_back(all[peer * group.size + group.rank]);
    }
    all_to_all("HcclAlltoAllVC", send, sends, offsets_of(sends), send_type, receive, receives, offsets_of(receives),
               receive_type, comm, stream);
  });
}

int HcclAlltoAll(const void *send, uint64_t send_count, int send_type, const void *receive, uint64_t receive_count,
                 int receive_type, void *comm, void *stream) {
  return status([&] {
    const size_t size = communicator(comm).size;
    const Counts sends(size, send_count), receives(size, receive_count);
    all_to_all("HcclAlltoAll", send, sends, offsets_of(sends), send_type, receive, receives, offsets_of(receives),
               receive_type, comm, stream);
  });
}
}
