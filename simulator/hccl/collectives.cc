// HCCL's collectives and point-to-point calls. Reductions are summed in float32 (whole numbers exactly), always in the
// order of the ranks, so that all ranks get the same bits. Which dtypes: the notes to each function in CANN 8.1's hccl.h.
#include <algorithm>

#include "exchange.h"

namespace sim::hccl {
namespace {

enum Reduction { SUM, PRODUCT, MAXIMUM, MINIMUM };

void check_reduction(const char *name, DType type, int reduction) {
  if (reduction < SUM || reduction > MINIMUM) fail("%s: no reduction %d", name, reduction);
  for (DType allowed : {INT8, INT16, INT32, INT64, FLOAT16, FLOAT32, BFLOAT16}) {
    if (type != allowed) continue;
    if (reduction == PRODUCT && (type == INT16 || type == BFLOAT16)) break;
    return;
  }
  fail("%s: reduction %d (sum, prod, max, min) of %s is not supported", name, reduction, name_of(type));
}

template <class T>
void reduce_in(const Tensor &out, int reduction, const std::vector<const void *> &contributions) {
  std::vector<T> total;
  for (const void *contribution : contributions) {
    auto values = read<T>(make_tensor(out.type, out.shape, const_cast<void *>(contribution)));
    if (total.empty()) {
      total = std::move(values);
      continue;
    }
    for (size_t i = 0; i < total.size(); ++i) {
      switch (reduction) {
        case SUM: total[i] += values[i]; break;
        case PRODUCT: total[i] *= values[i]; break;
        case MAXIMUM: total[i] = std::max(total[i], values[i]); break;
        default: total[i] = std::min(total[i], values[i]);
      }
    }
  }
  write(out, total);
}

void reduce(const Tensor &out, int reduction, const std::vector<const void *> &contributions) {
  is_float(out.type) ? reduce_in<float>(out, reduction, contributions) : reduce_in<int64_t>(out, reduction, contributions);
}

}  // namespace
}  // namespace sim::hccl

using namespace sim;
using namespace sim::hccl;

extern "C" {

int HcclAllReduce(void *send, void *receive, uint64_t count, int type, int reduction, void *comm, void *stream) {
  return status([&] {
    const DType t = type_of(type);
    check_reduction("HcclAllReduce", t, reduction);
    const Shape shape = {int64_t(count)};
    queue(comm, stream, "HcclAllReduce", call("AllReduce", t, count, reduction),
          {make_tensor(t, shape, send), make_tensor(t, shape, receive)},
          [](Communicator &group, Exchange &exchange, const Call &what, const Tensors &t) {
            const uint64_t bytes = t[0].size() * size_of(t[0].type);
            for (int peer = 0; peer < group.size; ++peer) {
              exchange.send(peer, t[0].data, bytes);
              exchange.receive_aside(peer, bytes);
            }
            exchange.run(group, what);
            reduce(t[1], what.reduction, exchange.received());
          });
  });
}

int HcclReduce(void *send, void *receive, uint64_t count, int type, int reduction, uint32_t root, void *comm,
               void *stream) {
  return status([&] {
    const DType t = type_of(type);
    check_reduction("HcclReduce", t, reduction);
    communicator(comm).check_peer(root, "HcclReduce");
    const Shape shape = {int64_t(count)};
    queue(comm, stream, "HcclReduce", call("Reduce", t, count, reduction, root),
          {make_tensor(t, shape, send), make_tensor(t, shape, receive)},
          [root](Communicator &group, Exchange &exchange, const Call &what, const Tensors &t) {
            const uint64_t bytes = t[0].size() * size_of(t[0].type);
            exchange.send(root, t[0].data, bytes);
            for (int peer = 0; peer < group.size && group.rank == int(root); ++peer) exchange.receive_aside(peer, bytes);
            exchange.run(group, what);
            if (group.rank == int(root)) reduce(t[1], what.reduction, exchange.received());
          });
  });
}

int HcclReduceScatter(void *send, void *receive, uint64_t count, int type, int reduction, void *comm, void *stream) {
  return status([&] {
    const DType t = type_of(type);
    check_reduction("HcclReduceScatter", t, reduction);
    queue(comm, stream, "HcclReduceScatter", call("ReduceScatter", t, count, reduction),
          {make_tensor(t, {int64_t(count) * communicator(comm).size}, send), make_tensor(t, {int64_t(count)}, receive)},
          [count](Communicator &group, Exchange &exchange, const Call &what, const Tensors &t) {
            const uint64_t bytes = count * size_of(t[0].type);
            for (int peer = 0; peer < group.size; ++peer) {
              exchange.send(peer, at(t[0], peer * count), bytes);
              exchange.receive_aside(peer, bytes);
            }
            exchange.run(group, what);
            reduce(t[1], what.reduction, exchange.received());
          });
  });
}

int HcclReduceScatterV(void *send, const void *counts, const void *offsets, void *receive, uint64_t count, int type,
                       int reduction, void *comm, void *stream) {
  return status([&] {
    const DType t = type_of(type);
    check_reduction("HcclReduceScatterV", t, reduction);
    const int size = communicator(comm).size;
    const Counts parts = counts_of(counts, size), places = counts_of(offsets, size);
    queue(comm, stream, "HcclReduceScatterV", call("ReduceScatterV", t, 0, reduction),
          {make_tensor(t, {reach(parts, places)}, send), make_tensor(t, {int64_t(count)}, receive)},
          [=](Communicator &group, Exchange &exchange, const Call &what, const Tensors &t) {
            for (int peer = 0; peer < group.size; ++peer) {
              exchange.send(peer, at(t[0], places[peer]), parts[peer] * size_of(t[0].type));
              exchange.receive_aside(peer, count * size_of(t[0].type));
            }
            exchange.run(group, what);
            reduce(t[1], what.reduction, exchange.received());
          });
  });
}

int HcclAllGather(void *send, void *receive, uint64_t count, int type, void *comm, void *stream) {
  return status([&] {
    const DType t = type_of(type);
    queue(comm, stream, "HcclAllGather", call("AllGather", t, count),
          {make_tensor(t, {int64_t(count)}, send), make_tensor(t, {int64_t(count) * communicator(comm).size}, receive)},
          [count](Communicator &group, Exchange &exchange, const Call &what, const Tensors &t) {
            const uint64_t bytes = count * size_of(t[0].type);
            for (int peer = 0; peer < group.size; ++peer) {
              exchange.send(peer, t[0].data, bytes);
              exchange.receive(peer, at(t[1], peer * count), bytes);
            }
            exchange.run(group, what);
          });
  });
}

int HcclBroadcast(void *data, uint64_t count, int type, uint32_t root, void *comm, void *stream) {
  return status([&] {
    const DType t = type_of(type);
    communicator(comm).check_peer(root, "HcclBroadcast");
    queue(comm, stream, "HcclBroadcast", call("Broadcast", t, count, -1, root), {make_tensor(t, {int64_t(count)}, data)},
          [root](Communicator &group, Exchange &exchange, const Call &what, const Tensors &t) {
            const uint64_t bytes = t[0].size() * size_of(t[0].type);
            for (int peer = 0; peer < group.size && group.rank == int(root); ++peer) {
              if (peer != group.rank) exchange.send(peer, t[0].data, bytes);
            }
            if (group.rank != int(root)) exchange.receive(root, t[0].data, bytes);
            exchange.run(group, what);
          });
  });
}

int HcclScatter(void *send, void *receive, uint64_t count, int type, uint32_t root, void *comm, void *stream) {
  return status([&] {
    const DType t = type_of(type);
    Communicator &group = communicator(comm);
    group.check_peer(root, "HcclScatter");
    const int64_t whole = group.rank == int(root) ? count * group.size : 0;
    queue(comm, stream, "HcclScatter", call("Scatter", t, count, -1, root),
          {make_tensor(t, {whole}, send), make_tensor(t, {int64_t(count)}, receive)},
          [count, root](Communicator &group, Exchange &exchange, const Call &what, const Tensors &t) {
            const uint64_t bytes = count * size_of(t[1].type);
            for (int peer = 0; peer < group.size && group.rank == int(root); ++peer) {
              exchange.send(peer, at(t[0], peer * count), bytes);
            }
            exchange.receive(root, t[1].data, bytes);
            exchange.run(group, what);
          });
  });
}

int HcclBarrier(void *comm, void *stream) {
  return status([&] {
    queue(comm, stream, "HcclBarrier", call("Barrier", UNDEFINED, 0), {},
          [](Communicator &group, Exchange &exchange, const Call &what, const Tensors &) { exchange.run(group, what); });
  });
}
}
