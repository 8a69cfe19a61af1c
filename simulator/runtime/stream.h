// Streams: queues of work, each with a thread.
//
// Work of one stream runs in order; between streams nothing is in order but by events and synchronisation. With
// SIM_DELAY=seed a stream waits a random, reproducible while before each task, so that a missing event or
// synchronisation shows as wrong numbers. With SIM_BLOCKING=1 every call waits for its work, so that an error comes from
// the call that made it. With SIM_OPERATORS=none operators do nothing: what is left is the host's time. With
// SIM_OPERATORS=AdamW,Cast only those do their work whose names hold one of these.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace sim {

struct Task {
  std::string what;
  std::function<void()> work;
  bool always = false;  // runs after a failure too: events and callbacks, which others wait for
};

void enqueue(void *stream, Task task);
// Waits until all that was queued so far has run. Fails with the device's first failure, in whichever stream it was.
void synchronize(void *stream);
void check_device();  // fails likewise, without waiting
void reset_device();  // forgets failures, as a reset of the card does
void synchronize_all();
void drain();                          // waits for all streams, failed or not
bool is_idle(void *stream);
int stream_number(const void *stream);
void *default_stream();                // what a null stream means
std::vector<void *> all_streams();
bool operators_do_nothing();           // SIM_OPERATORS is set: most of them
bool does_nothing(const std::string &operator_name);

// While `into` is not null, what is queued goes there instead. Gives back what was before.
std::vector<Task> *capture(void *stream, std::vector<Task> *into);
std::vector<Task> *captured(void *stream);

}  // namespace sim
