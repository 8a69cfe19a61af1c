// What all of HCCL's entry points need.
#pragma once

#include "communicator.h"

namespace sim::hccl {

Communicator &communicator(void *comm);  // fails if it is not one, or was destroyed

template <class Function>
int status(Function &&function) {  // HcclResult: 0, or HCCL_E_INTERNAL
  return guard(function) == OK ? 0 : 4;
}

}  // namespace sim::hccl
