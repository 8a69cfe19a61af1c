// Errors, and their text as ACL gives it back.
#include <cstdio>

#include "runtime/log.h"
#include "sim.h"

namespace sim {
namespace {
std::string vformat(const char *form, va_list arguments) {
  char buffer[4096];
  vsnprintf(buffer, sizeof(buffer), form, arguments);
  return buffer;
}
thread_local std::string recent;
}  // namespace

std::string format(const char *form, ...) {
  va_list arguments;
  va_start(arguments, form);
  std::string text = vformat(form, arguments);
  va_end(arguments);
  return text;
}

void fail(const char *form, ...) {
  va_list arguments;
  va_start(arguments, form);
  std::string text = vformat(form, arguments);
  va_end(arguments);
  throw Error(INVALID, text);
}

int report(const Error &error) {
  recent = std::string("simulator: ") + error.what();
  fprintf(stderr, "%s\n", recent.c_str());
  log::event("error", nullptr, "", 0, error.what());
  return error.status;
}
}  // namespace sim

extern "C" const char *aclGetRecentErrMsg() {
  static thread_local std::string given;
  if (sim::recent.empty()) return nullptr;
  given = std::move(sim::recent);
  sim::recent.clear();
  return given.c_str();
}
