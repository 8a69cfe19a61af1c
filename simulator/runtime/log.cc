#include "runtime/log.h"

#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <mutex>

#include "runtime/stream.h"
#include "sim.h"

namespace sim::log {
namespace {
FILE *open_file() {
  const char *path = getenv("SIM_LOG");
  if (path == nullptr || *path == 0) return nullptr;
  const char *rank = getenv("RANK_ID");
  std::string name = rank == nullptr ? std::string(path) : std::string(path) + "." + rank;  // a file a process of msrun
  FILE *file = fopen(name.c_str(), "w");
  if (file == nullptr) fprintf(stderr, "simulator: cannot write SIM_LOG %s\n", name.c_str());
  else atexit(flush);
  return file;
}
FILE *file() {
  static FILE *const f = open_file();
  return f;
}
}  // namespace

bool on() { return file() != nullptr; }

void event(const char *kind, const void *stream, const std::string &name, size_t bytes, const std::string &details) {
  if (!on()) return;
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  fprintf(file(), "%lld\t%s\t%d\t%s\t%zu\t%s\n", now.tv_sec * 1000000LL + now.tv_nsec / 1000, kind,
          stream == nullptr ? -1 : stream_number(stream), name.c_str(), bytes, details.c_str());
}

void flush() {
  if (on()) fflush(file());
}
}  // namespace sim::log
