// The matrix product that several operators have: of the last two axes, broadcast over the others, in float32.
#pragma once

#include "../sim.h"

namespace sim {

Shape product_shape(const Op &op, const Tensor &a, const Tensor &b);  // refuses what does not fit
std::vector<float> matrix_product(const Tensor &a, const Tensor &b);

}  // namespace sim
