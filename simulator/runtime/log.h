// The log of what the device was asked to do (SIM_LOG=file; a line each, tab separated, read by report.py):
// microseconds, kind, stream, name, bytes, details.
#pragma once
#include <cstddef>
#include <string>

namespace sim::log {
bool on();
// Kinds: launch, copy, allocate, free, synchronize, error.
void event(const char *kind, const void *stream, const std::string &name, size_t bytes, const std::string &details);
void flush();
}  // namespace sim::log
