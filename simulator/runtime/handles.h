// The handles of aclnn's prototypes, where one is found without knowing what it is.
#pragma once
#include "sim.h"

namespace sim {
// Dtype, shape and strides of a tensor, or of those of a list; empty if the pointer is neither, or was destroyed.
std::string describe_handle(const void *pointer);
}  // namespace sim
