#include "communicator.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace sim::hccl {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_of(const char *variable, double otherwise) {
  const char *text = getenv(variable);
  return text == nullptr ? otherwise : atof(text);
}

Clock::time_point after(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

// Where rank listens: a name in Linux's abstract namespace, which leaves no file behind.
struct Address {
  sockaddr_un address{};
  socklen_t length;
  Address(const std::string &identifier, int rank) {
    const std::string path = identifier + "-" + std::to_string(rank);
    address.sun_family = AF_UNIX;
    memcpy(address.sun_path + 1, path.data(), std::min(path.size(), sizeof(address.sun_path) - 1));
    length = offsetof(sockaddr_un, sun_path) + 1 + path.size();
  }
  const sockaddr *get() const { return reinterpret_cast<const sockaddr *>(&address); }
};

struct Greeting {
  int32_t rank, size;
};

// Moves all bytes of a small message on a blocking socket.
template <class Function>
bool whole(Function move, int socket, void *data, size_t bytes) {
  auto *at = static_cast<char *>(data);
  while (bytes > 0) {
    const ssize_t moved = move(socket, at, bytes, MSG_NOSIGNAL);
    if (moved <= 0) return false;
    at += moved;
    bytes -= moved;
  }
  return true;
}

}  // namespace

Call call(const char *name, DType type, uint64_t count, int reduction, int root) {
  Call result{};
  strncpy(result.name, name, sizeof(result.name) - 1);
  result.type = type;
  result.count = count;
  result.reduction = reduction;
  result.root = root;
  return result;
}

std::string text(const Call &call) {
  static const char *reductions[] = {"sum", "prod", "max", "min"};
  std::string s = call.name;
  if (s == "Send/Recv") s = call.sends > 0 ? "Send" : "Recv";
  if (call.type != UNDEFINED) s += format("(%s, %lu elements", name_of(DType(call.type)), static_cast<unsigned long>(call.count));
  if (call.reduction >= 0) s += std::string(", ") + reductions[call.reduction];
  if (call.root >= 0) s += ", root " + std::to_string(call.root);
  return s + (call.type != UNDEFINED ? ")" : "");
}

Communicator::Communicator(const std::string &identifier, const std::string &name, int rank, int size)
    : name(name), rank(rank), size(size), sockets_(size, -1) {
  if (size < 1 || rank < 0 || rank >= size) fail("HCCL: rank %d of a group of %d", rank, size);
  connect(identifier);
}

Communicator::~Communicator() {
  for (int socket : sockets_) {
    if (socket >= 0) close(socket);
  }
}

// Every rank listens for those above it and calls those below it.
void Communicator::connect(const std::string &identifier) {
  const double patience = seconds_of("HCCL_CONNECT_TIMEOUT", 120);
  const auto deadline = after(patience);
  const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const Address own(identifier, rank);
  if (listener < 0 || bind(listener, own.get(), own.length) != 0 || listen(listener, size) != 0) {
    fail("HCCL: rank %d cannot listen for group %s: %s", rank, name.c_str(), strerror(errno));
  }
  auto missing = [&](const char *who, int peer) {
    close(listener);
    fail("HCCL: group %s: rank %d waited %g s for %s %d of %d", name.c_str(), rank, patience, who, peer, size);
  };
  for (int peer = 0; peer < rank; ++peer) {
    const Address address(identifier, peer);
    int connection = -1;
    while (true) {
      connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
      if (::connect(connection, address.get(), address.length) == 0) break;
      close(connection);
      if (Clock::now() > deadline) missing("rank", peer);
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    Greeting greeting{rank, size};
    whole(send, connection, &greeting, sizeof(greeting));
    sockets_[peer] = connection;
  }
  for (int waiting = size - 1 - rank; waiting > 0; --waiting) {
    pollfd one{listener, POLLIN, 0};
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    if (poll(&one, 1, std::max<long>(left, 0)) <= 0) missing("ranks; missing are", waiting);
    const int connection = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
    Greeting greeting{};
    if (!whole(recv, connection, &greeting, sizeof(greeting)) || greeting.size != size || greeting.rank <= rank ||
        greeting.rank >= size || sockets_[greeting.rank] >= 0) {
      close(listener);
      fail("HCCL: group %s: rank %d has %d ranks, another process joins it as rank %d of %d", name.c_str(), rank, size,
           greeting.rank, greeting.size);
    }
    sockets_[greeting.rank] = connection;
  }
  close(listener);
  for (int socket : sockets_) {
    if (socket >= 0) fcntl(socket, F_SETFL, fcntl(socket, F_GETFL) | O_NONBLOCK);
  }
}

void Communicator::check_peer(int64_t peer, const char *what) const {
  if (peer < 0 || peer >= size) fail("%s: rank %ld is not in group %s of %d", what, long(peer), name.c_str(), size);
}

void Communicator::give_up(const std::string &why) {
  failure_ = why;
  for (int &socket : sockets_) {  // so that the others hear of it
    if (socket >= 0) close(socket);
    socket = -1;
  }
  fail("%s", why.c_str());
}

void Communicator::exchange(const std::string &what, const std::vector<Part> &parts) {
  const double patience = seconds_of("HCCL_EXEC_TIMEOUT", 1836);
  const auto deadline = after(patience);
  std::vector<uint64_t> sent(parts.size()), received(parts.size());
  while (true) {
    std::vector<pollfd> waiting;
    std::vector<size_t> of;
    for (size_t i = 0; i < parts.size(); ++i) {
      const short events = (sent[i] < parts[i].out_bytes ? POLLOUT : 0) | (received[i] < parts[i].in_bytes ? POLLIN : 0);
      if (events == 0) continue;
      waiting.push_back({sockets_[parts[i].peer], events, 0});
      of.push_back(i);
    }
    if (waiting.empty()) return;
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    if (left <= 0 || poll(waiting.data(), waiting.size(), std::min<long>(left, 1 << 30)) == 0) {
      std::string peers;
      for (size_t i : of) peers += (peers.empty() ? "" : ", ") + std::to_string(parts[i].peer);
      give_up(format("HCCL: group %s: rank %d waited %g s in %s for rank %s", name.c_str(), rank, patience,
                     what.c_str(), peers.c_str()));
    }
    for (size_t k = 0; k < waiting.size(); ++k) {
      const Part &part = parts[of[k]];
      uint64_t &out = sent[of[k]], &in = received[of[k]];
      if (waiting[k].revents & POLLOUT) {
        const ssize_t n = send(waiting[k].fd, static_cast<const char *>(part.out) + out, part.out_bytes - out, MSG_NOSIGNAL);
        if (n > 0) out += n;
      }
      if (waiting[k].revents & (POLLIN | POLLHUP | POLLERR)) {
        const ssize_t n = recv(waiting[k].fd, static_cast<char *>(part.in) + in, part.in_bytes - in, 0);
        if (n > 0) {
          in += n;
        } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
          give_up(format("HCCL: group %s: rank %d is in %s, rank %d has left the group", name.c_str(), rank,
                         what.c_str(), part.peer));
        }
      }
    }
  }
}

void Communicator::run(const Call &mine, const std::vector<Part> &parts) {
  std::lock_guard<std::mutex> lock(mutex_);
  const std::string what = text(mine);
  if (!failure_.empty()) fail("%s; now called: %s", failure_.c_str(), what.c_str());
  std::vector<Call> said(parts.size(), mine), heard(parts.size());
  std::vector<Part> calls;
  for (size_t i = 0; i < parts.size(); ++i) {
    said[i].sends = parts[i].out_bytes;
    said[i].expects = parts[i].in_bytes;
    calls.push_back({parts[i].peer, &said[i], sizeof(Call), &heard[i], sizeof(Call)});
  }
  exchange(what, calls);
  for (size_t i = 0; i < parts.size(); ++i) {
    const Call &theirs = heard[i];
    const bool same = strncmp(mine.name, theirs.name, sizeof(mine.name)) == 0 && mine.type == theirs.type &&
                      mine.reduction == theirs.reduction && mine.root == theirs.root && mine.count == theirs.count;
    if (same && theirs.sends == said[i].expects && theirs.expects == said[i].sends) continue;
    std::string difference = same ? format("; it sends %lu bytes where %lu are expected and expects %lu where %lu are sent",
                                           (unsigned long)theirs.sends, (unsigned long)said[i].expects,
                                           (unsigned long)theirs.expects, (unsigned long)said[i].sends)
                                  : "";
    give_up(format("HCCL: group %s: rank %d called %s, rank %d called %s%s", name.c_str(), rank, what.c_str(),
                   parts[i].peer, text(theirs).c_str(), difference.c_str()));
  }
  exchange(what, parts);
}

}  // namespace sim::hccl
