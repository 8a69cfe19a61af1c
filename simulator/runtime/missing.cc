// What is asked for and not simulated: refused by name, with what it was called with.
#include <cstdlib>

#include "runtime/handles.h"
#include "sim.h"

extern "C" {

// Of an aclnn operator. Its prototype is unknown: what among the first words of its arguments is a tensor is described.
int sim_missing_operator(const char *name, const intptr_t *words, int count) {
  return sim::guard([&] {
    std::string tensors;
    for (int i = 0; i < count; ++i) {
      std::string found = sim::describe_handle(reinterpret_cast<void *>(words[i]));
      if (!found.empty()) tensors += (tensors.empty() ? "" : ", ") + sim::format("argument %d ", i) + found;
    }
    sim::fail("%s is not simulated; it was called with %s", name, tensors.empty() ? "no tensor" : tensors.c_str());
  });
}

// Of anything else: there is no value to go on with.
void sim_missing_function(const char *name) {
  fprintf(stderr, "simulator: %s is not simulated (graph-engine mode and image processing are not)\n", name);
  abort();
}
}
