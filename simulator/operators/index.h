// Picking and adding rows by index, which several operators share.
#pragma once

#include "../sim.h"

namespace sim {

int64_t checked_index(int64_t index, int64_t length);  // a negative one counts from the end; fails outside the axis

// out = the slices of x at the indices along an axis; out has x's shape with the indices' axes in its place.
void take(const Tensor &x, int64_t axis, const std::vector<int64_t> &indices, const Tensor &out);

// out[i] = the sum of the rows whose index is i, in float32; rows with the index `skipped` do not count.
void add_rows(const Tensor &rows, const std::vector<int64_t> &indices, int64_t skipped, const Tensor &out);

}  // namespace sim
