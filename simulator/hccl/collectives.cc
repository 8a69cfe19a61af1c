// HCCL's collectives and point-to-point calls. Reductions are summed in float32 (whole numbers exactly), always in the
// order of the ranks, so that all ranks get the same bits. Which dtypes: the notes to each function in CANN 8.1's hccl.h.
#include <algorithm>
#include <cstring>
#include <map>

#include "groups.h"

namespace sim::hccl {
namespace {

using Counts = std::vector<uint64_t>;

DType type_of(int hccl) {
  static const DType types[] = {INT8, INT16, INT32, FLOAT16, FLOAT32, INT64, UINT64, UINT8, UINT16, UINT32, FLOAT64,
                                BFLOAT16};
  if (hccl < 0 || hccl >= 12) fail("HCCL: no data type %d", hccl);
  return types[hccl];
}

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

// A call in the making: the bytes for and from each rank of the group, this one included.
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

char *at(const Tensor &tensor, uint64_t element) {
  return static_cast<char *>(tensor.data) + element * size_of(tensor.type);
}

// Queues a collective: `work` fills the exchange from the tensors and may use what it received.
using Work = std::function<void(Communicator &, Exchange &, const Call &, const Tensors &)>;
void queue(void *comm, void *stream, const char *name, const Call &what, const Tensors &tensors, Work work) {
  Communicator &group = communicator(comm);
  const std::string settings = format("group %s, rank %d of %d", group.name.c_str(), group.rank, group.size);
  launch(stream, name, tensors, settings, [comm, what, work](const Tensors &t) {
    Communicator &group = communicator(comm);
    Exchange exchange(group.size);
    work(group, exchange, what, t);
  });
}

Counts counts_of(const void *counts, int size) {
  const auto *first = static_cast<const uint64_t *>(counts);
  return Counts(first, first + size);
}

int64_t reach(const Counts &counts, const Counts &offsets) {  // elements that a buffer must have
  uint64_t end = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] > 0) end = std::max(end, offsets[i] + counts[i]);
  }
  return end;
}

Counts offsets_of(const Counts &counts) {
  Counts offsets(counts.size());
  for (size_t i = 1; i < counts.size(); ++i) offsets[i] = offsets[i - 1] + counts[i - 1];
  return offsets;
}

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

void send_or_receive(const char *name, void *data, uint64_t count, int hccl_type, uint32_t peer, void *comm, void *stream,
                     bool sends) {
  const DType type = type_of(hccl_type);
  communicator(comm).check_peer(peer, name);
  Call what = call("Send/Recv", type, count);
  (sends ? what.sends : what.expects) = count * size_of(type);
  queue(comm, stream, name, what, {make_tensor(type, {int64_t(count)}, data)},
        [=](Communicator &group, Exchange &, const Call &what, const Tensors &t) {
          Part part{static_cast<int>(peer)};
          (sends ? part.out_bytes : part.in_bytes) = count * size_of(type);
          part.out = part.in = t[0].data;
          group.run(what, {part});
        });
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

// A send waits for its receive, as on the card: two ranks that both send first wait for ever.
int HcclSend(void *data, uint64_t count, int type, uint32_t peer, void *comm, void *stream) {
  return status([&] { send_or_receive("HcclSend", data, count, type, peer, comm, stream, true); });
}
int HcclRecv(void *data, uint64_t count, int type, uint32_t peer, void *comm, void *stream) {
  return status([&] { send_or_receive("HcclRecv", data, count, type, peer, comm, stream, false); });
}

int HcclBarrier(void *comm, void *stream) {
  return status([&] {
    queue(comm, stream, "HcclBarrier", call("Barrier", UNDEFINED, 0), {},
          [](Communicator &group, Exchange &exchange, const Call &what, const Tensors &) { exchange.run(group, what); });
  });
}

struct SendRecvItem {
  int32_t kind;  // 0 sends, 1 receives
  void *data;
  uint64_t count;
  int32_t type;
  uint32_t peer;
};

// All of the items at once; several for one peer are matched in their order.
int HcclBatchSendRecv(SendRecvItem *items, uint32_t count, void *comm, void *stream) {
  return status([&] {
    const std::vector<SendRecvItem> all(items, items + count);
    Tensors tensors;
    for (const auto &item : all) {
      communicator(comm).check_peer(item.peer, "HcclBatchSendRecv");
      tensors.push_back(make_tensor(type_of(item.type), {int64_t(item.count)}, item.data));
    }
    queue(comm, stream, "HcclBatchSendRecv", call("BatchSendRecv", UNDEFINED, 0), tensors,
          [all](Communicator &group, Exchange &exchange, const Call &what, const Tensors &t) {
            std::map<int, std::vector<char>> out, in;
            for (size_t i = 0; i < all.size(); ++i) {
              const char *data = static_cast<const char *>(t[i].data);
              const uint64_t bytes = t[i].size() * size_of(t[i].type);
              if (all[i].kind == 0) out[all[i].peer].insert(out[all[i].peer].end(), data, data + bytes);
              else in[all[i].peer].resize(in[all[i].peer].size() + bytes);
            }
            std::map<int, Part> parts;
            for (auto &[peer, bytes] : out) {
              parts[peer].out = bytes.data();
              parts[peer].out_bytes = bytes.size();
            }
            for (auto &[peer, bytes] : in) {
              parts[peer].in = bytes.data();
              parts[peer].in_bytes = bytes.size();
            }
            if (out.count(group.rank) > 0 || in.count(group.rank) > 0) {
              if (out[group.rank].size() != in[group.rank].size()) fail("a rank sends itself other than it receives");
              in[group.rank] = out[group.rank];
            }
            std::vector<Part> others;
            for (auto &[peer, part] : parts) {
              part.peer = peer;
              if (peer != group.rank) others.push_back(part);
            }
            group.run(what, others);
            std::map<int, size_t> taken;
            for (size_t i = 0; i < all.size(); ++i) {
              if (all[i].kind == 0) continue;
              const uint64_t bytes = t[i].size() * size_of(t[i].type);
              memcpy(t[i].data, in[all[i].peer].data() + taken[all[i].peer], bytes);
              taken[all[i].peer] += bytes;
            }
          });
  });
}
}
