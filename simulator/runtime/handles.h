// Parts of the runtime that know of each other's handles.
#pragma once
#include "sim.h"

namespace sim {
bool is_live_tensor(const void *pointer);  // an aclTensor that has not been destroyed
}  // namespace sim
