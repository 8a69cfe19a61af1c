// HCCL's sends and receives.
#include <map>

#include "exchange.h"

namespace sim::hccl {
namespace {

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

// A send waits for its receive, and what follows waits for it (HCCL's documentation: used in pairs, in strict order, both
// ends synchronised before the next task). Two ranks that both send first would wait for ever: here they are told.
int HcclSend(void *data, uint64_t count, int type, uint32_t peer, void *comm, void *stream) {
  return status([&] { send_or_receive("HcclSend", data, count, type, peer, comm, stream, true); });
}
int HcclRecv(void *data, uint64_t count, int type, uint32_t peer, void *comm, void *stream) {
  return status([&] { send_or_receive("HcclRecv", data, count, type, peer, comm, stream, false); });
}

struct SendRecvItem {
  int32_t kind;  // 0 sends, 1 receives
  void *data;
  uint64_t count;
  int32_t type;
  uint32_t peer;
};

// All of the items at once, without an order; for each peer one to it and one from it at most.
int HcclBatchSendRecv(SendRecvItem *items, uint32_t count, void *comm, void *stream) {
  return status([&] {
    const std::vector<SendRecvItem> all(items, items + count);
    Tensors tensors;
    std::map<std::pair<int, uint32_t>, int> seen;
    for (const auto &item : all) {
      communicator(comm).check_peer(item.peer, "HcclBatchSendRecv");
      if (++seen[{item.kind, item.peer}] > 1) fail("HcclBatchSendRecv: two items of one direction for rank %u", item.peer);
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
