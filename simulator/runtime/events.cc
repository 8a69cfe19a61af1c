// Events: a stream records one, other streams and the host wait for what it recorded.
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "runtime/log.h"
#include "runtime/stream.h"
#include "sim.h"

using sim::Task;

namespace {
// What a wait waits for is the recording at the time of the call; a later one replaces it for later waits.
struct Recording {
  std::mutex lock;
  std::condition_variable changed;
  bool done = false;
  std::chrono::steady_clock::time_point time;

  void finish() {
    std::lock_guard hold(lock);
    done = true;
    time = std::chrono::steady_clock::now();
    changed.notify_all();
  }
  void wait() {
    std::unique_lock hold(lock);
    changed.wait(hold, [this] { return done; });
  }
};

struct Event {
  std::mutex lock;
  std::shared_ptr<Recording> last;  // null until recorded
};

std::shared_ptr<Recording> recording_of(void *handle) {
  auto *event = static_cast<Event *>(handle);
  std::lock_guard hold(event->lock);
  return event->last;
}
}  // namespace

extern "C" {

int aclrtCreateEvent(void **event) {
  *event = new Event;
  return 0;
}
int aclrtCreateEventWithFlag(void **event, uint32_t flag) { return aclrtCreateEvent(event); }
int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { return aclrtCreateEvent(event); }
int aclrtDestroyEvent(void *event) {
  delete static_cast<Event *>(event);
  return 0;
}

int aclrtRecordEvent(void *handle, void *stream) {
  auto *event = static_cast<Event *>(handle);
  auto recording = std::make_shared<Recording>();
  {
    std::lock_guard hold(event->lock);
    event->last = recording;
  }
  return sim::guard([&] { sim::enqueue(stream, Task{"event", [recording] { recording->finish(); }, true}); });
}
int aclrtResetEvent(void *event, void *stream) { return 0; }  // the next recording replaces the last

int aclrtStreamWaitEvent(void *stream, void *handle) {
  auto recording = recording_of(handle);
  if (recording == nullptr) return 0;
  return sim::guard([&] { sim::enqueue(stream, Task{"wait for event", [recording] { recording->wait(); }, true}); });
}
int aclrtSynchronizeEvent(void *handle) {
  sim::log::event("synchronize", nullptr, "event", 0, "");
  auto recording = recording_of(handle);
  if (recording != nullptr) recording->wait();
  return sim::guard([] { sim::check_device(); });
}
int aclrtQueryEventStatus(void *handle, int32_t *status) {  // 0 not yet, 1 recorded
  auto recording = recording_of(handle);
  *status = 1;
  if (recording != nullptr) {
    std::lock_guard hold(recording->lock);
    *status = recording->done;
  }
  return 0;
}
int aclrtEventGetTimestamp(void *handle, uint64_t *microseconds) {
  auto recording = recording_of(handle);
  if (recording == nullptr) return sim::INVALID;
  recording->wait();
  *microseconds = std::chrono::duration_cast<std::chrono::microseconds>(recording->time.time_since_epoch()).count();
  return 0;
}
int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) {
  uint64_t from = 0, to = 0;
  int status = aclrtEventGetTimestamp(start, &from);
  if (status == 0) status = aclrtEventGetTimestamp(end, &to);
  *milliseconds = (to - from) / 1000.0f;
  return status;
}

}  // extern "C"
