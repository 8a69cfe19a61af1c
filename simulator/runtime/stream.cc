#include "runtime/stream.h"

#include <unistd.h>

#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <random>
#include <set>
#include <sstream>
#include <thread>
#include <utility>

#include "runtime/log.h"
#include "sim.h"

namespace sim {
namespace {
bool flag(const char *name, const char *value) {
  const char *given = getenv(name);
  return given != nullptr && std::string(given) == value;
}
bool blocking() {
  static const bool on = flag("SIM_BLOCKING", "1");
  return on;
}

// The first failure of all: from then on every call that waits for the device says so, whichever stream it asks about.
struct Failure {
  std::mutex lock;
  std::string text;
};
Failure &failure_of_device() {
  static Failure &failure = *new Failure;
  return failure;
}

struct Stream {
  const int number;
  std::mutex lock;
  std::condition_variable arrived, finished;
  std::deque<Task> queue;
  uint64_t queued = 0, done = 0;
  bool closing = false;
  std::string failure;                       // of the first task that failed
  std::vector<Task> *captured = nullptr;     // where tasks go instead, while a graph is captured
  std::minstd_rand random;

  explicit Stream(int number) : number(number) {
    if (const char *seed = getenv("SIM_DELAY")) random.seed(unsigned(atol(seed)) * 1000003u + number + 1);
    std::thread([this] { run(); }).detach();
  }

  void wait(std::unique_lock<std::mutex> &hold) {
    uint64_t until = queued;
    finished.wait(hold, [&] { return done >= until; });
  }

  void run() {
    const bool delays = getenv("SIM_DELAY") != nullptr;
    std::unique_lock hold(lock);
    while (true) {
      arrived.wait(hold, [this] { return !queue.empty() || closing; });
      if (queue.empty()) break;
      Task task = std::move(queue.front());
      queue.pop_front();
      bool skip = !failure.empty() && !task.always;
      hold.unlock();
      if (delays && random() % 3 == 0) usleep(random() % 2000);
      std::string error;
      if (!skip) try {
          task.work();
        } catch (const std::exception &e) {
          error = e.what();
        }
      task.work = nullptr;  // what it holds goes before the task counts as done
      hold.lock();
      if (!error.empty() && failure.empty()) {
        failure = error;
        log::event("error", this, task.what, 0, error);
        const std::string text = format("stream %d stopped at %s", number, error.c_str());
        fprintf(stderr, "simulator: %s\n", text.c_str());
        std::lock_guard all(failure_of_device().lock);
        if (failure_of_device().text.empty()) failure_of_device().text = text;
      }
      ++done;
      finished.notify_all();
    }
  }
};  // never deleted: another thread may be looking at it while it is destroyed

struct Streams {
  std::mutex lock;
  std::set<Stream *> live;
  int next = 0;
  Stream *make() {
    std::lock_guard hold(lock);
    auto *stream = new Stream(next++);
    live.insert(stream);
    return stream;
  }
};
Streams &streams() {
  static Streams &all = *new Streams;  // threads may still use it while the process ends
  return all;
}

Stream *get(void *stream) {
  return static_cast<Stream *>(stream == nullptr ? default_stream() : stream);
}
}  // namespace

bool operators_do_nothing() {
  static const bool set = getenv("SIM_OPERATORS") != nullptr && !flag("SIM_OPERATORS", "");
  return set;
}

bool does_nothing(const std::string &name) {
  if (!operators_do_nothing()) return false;
  static const std::vector<std::string> working = [] {
    std::vector<std::string> names;
    std::stringstream list(getenv("SIM_OPERATORS"));
    for (std::string one; std::getline(list, one, ',');)
      if (one != "none") names.push_back(one);
    return names;
  }();
  for (const std::string &one : working)
    if (name.find(one) != std::string::npos) return false;
  return true;
}

void *default_stream() {
  static Stream *const stream = streams().make();
  return stream;
}

int stream_number(const void *stream) { return static_cast<const Stream *>(stream)->number; }

std::vector<void *> all_streams() {
  std::lock_guard hold(streams().lock);
  return {streams().live.begin(), streams().live.end()};
}

void enqueue(void *handle, Task task) {
  Stream *stream = get(handle);
  {
    std::lock_guard hold(stream->lock);
    if (stream->captured != nullptr) {
      stream->captured->push_back(std::move(task));
      return;
    }
    stream->queue.push_back(std::move(task));
    ++stream->queued;
  }
  stream->arrived.notify_one();
  if (blocking()) synchronize(handle);
}

void synchronize(void *handle) {
  Stream *stream = get(handle);
  {
    std::unique_lock hold(stream->lock);
    stream->wait(hold);
  }
  check_device();
}

void check_device() {
  std::lock_guard hold(failure_of_device().lock);
  if (!failure_of_device().text.empty()) throw Error(DEVICE_FAULT, failure_of_device().text);
}

void synchronize_all() {
  for (void *stream : all_streams()) synchronize(stream);
}

std::vector<Task> *capture(void *handle, std::vector<Task> *into) {
  Stream *stream = get(handle);
  std::lock_guard hold(stream->lock);
  return std::exchange(stream->captured, into);
}

std::vector<Task> *captured(void *handle) {
  Stream *stream = get(handle);
  std::lock_guard hold(stream->lock);
  return stream->captured;
}

void drain() {
  for (void *handle : all_streams()) {
    auto *stream = static_cast<Stream *>(handle);
    std::unique_lock hold(stream->lock);
    stream->wait(hold);
  }
}

void reset_device() {
  drain();
  for (void *handle : all_streams()) {
    auto *stream = static_cast<Stream *>(handle);
    std::lock_guard hold(stream->lock);
    stream->failure.clear();
  }
  std::lock_guard hold(failure_of_device().lock);
  failure_of_device().text.clear();
}

bool is_idle(void *handle) {
  Stream *stream = get(handle);
  std::lock_guard hold(stream->lock);
  return stream->done == stream->queued;
}

void launch(void *stream, const std::string &what, const std::string &details, std::function<void()> work) {
  log::event("launch", get(stream), what, 0, details);
  if (does_nothing(what)) return;
  enqueue(stream, {what, std::move(work)});
}

}  // namespace sim

extern "C" {

int aclrtCreateStream(void **stream) {
  *stream = sim::streams().make();
  return 0;
}
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { return aclrtCreateStream(stream); }

int aclrtDestroyStream(void *handle) {
  auto *stream = static_cast<sim::Stream *>(handle);
  {
    std::lock_guard hold(sim::streams().lock);
    sim::streams().live.erase(stream);
  }
  std::lock_guard hold(stream->lock);
  stream->closing = true;
  stream->arrived.notify_one();
  return 0;
}
int aclrtDestroyStreamForce(void *stream) { return aclrtDestroyStream(stream); }

int aclrtSynchronizeStream(void *stream) {
  sim::log::event("synchronize", sim::get(stream), "stream", 0, "");
  return sim::guard([&] { sim::synchronize(stream); });
}
int aclrtSynchronizeStreamWithTimeout(void *stream, int32_t milliseconds) { return aclrtSynchronizeStream(stream); }
int aclrtSynchronizeDevice() {
  sim::log::event("synchronize", nullptr, "device", 0, "");
  return sim::guard([] { sim::synchronize_all(); });
}
int aclrtSynchronizeDeviceWithTimeout(int32_t milliseconds) { return aclrtSynchronizeDevice(); }
int aclrtResetDeviceForce(int32_t device) {
  sim::reset_device();
  return 0;
}
int aclrtStreamQuery(void *stream, int32_t *status) {  // 0 complete, 1 not ready
  *status = sim::is_idle(stream) ? 0 : 1;
  return 0;
}

int aclrtLaunchCallback(void (*function)(void *), void *data, int32_t block, void *stream) {
  return sim::guard([&] { sim::enqueue(stream, {"callback", [=] { function(data); }, true}); });
}

}  // extern "C"
