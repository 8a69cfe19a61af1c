// Launch capture (aclmdlRI…): what a stream is given between Begin and End is kept, and launched again by one call.
#include <memory>

#include "runtime/log.h"
#include "runtime/stream.h"
#include "sim.h"

using namespace sim;
using Graph = std::vector<Task>;

extern "C" {

int aclmdlRICaptureBegin(void *stream, int32_t mode) {
  return guard([&] {
    if (captured(stream) != nullptr) fail("aclmdlRICaptureBegin: this stream is being captured already");
    capture(stream, new Graph);
  });
}

int aclmdlRICaptureGetInfo(void *stream, int32_t *status, void **graph) {
  *graph = captured(stream);
  *status = *graph != nullptr;  // 0 none, 1 active
  return OK;
}

int aclmdlRICaptureEnd(void *stream, void **graph) {
  return guard([&] {
    *graph = capture(stream, nullptr);
    if (*graph == nullptr) fail("aclmdlRICaptureEnd: this stream is not being captured");
  });
}

int aclmdlRIExecuteAsync(void *graph, void *stream) {
  return guard([&] {
    const Graph &tasks = *static_cast<Graph *>(graph);
    log::event("launch", stream == nullptr ? default_stream() : stream, "captured graph", 0,
               std::to_string(tasks.size()) + " tasks");
    for (const Task &task : tasks) enqueue(stream, task);
  });
}

int aclmdlRIDestroy(void *graph) {
  drain();
  delete static_cast<Graph *>(graph);
  return OK;
}
}
