// What the bodies of the old operators share (their inputs, outputs and attributes are those of CANN's prototypes).
#pragma once

#include "../sim.h"

namespace sim {

using Indices = std::vector<int>;
using OldTable = std::vector<std::pair<std::string, OldOperator>>;

OldTable old_arithmetic();
OldTable old_moves();

// The operator, for results of these dtypes alone: those of the 910B in ops_910b_cann81.json.
OldOperator of(std::vector<DType> types, OldOperator body);

double attribute_of(const Attributes &attributes, const char *name, double otherwise);
Shape list_of(const Attributes &attributes, const char *name);  // empty if it is not given
void require_inputs(const Op &op, const Indices &in, size_t least);
Shape constant(const Op &op, int index);  // the values of a constant input, known while planning
int64_t checked_axis(const Op &op, int64_t axis, int64_t rank);

}  // namespace sim
