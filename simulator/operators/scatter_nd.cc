// Sums into places named by rows of indices. Not in CANN 8.1; documented in CANN's ops-nn of 2026 (aclnnTfScatterAdd.md).
#include "../sim.h"

namespace sim {
namespace {

// With K numbers in a row of indices: var[indices[i, :]] += updates[i], a slice of var's other dimensions. Without rows,
// where updates say so by their shape: var[indices[i]] += updates[i].
void scatter_add(Op &op, int var, int indices, int updates) {
  op.types(var, {FLOAT32, FLOAT16, BFLOAT16, INT32, INT8, UINT8});
  op.require(op[updates].type == op[var].type, "varRef and updates differ in dtype");
  op.types(indices, {INT32, INT64});
  for (int i : {var, indices, updates}) op.rank(i, 1, 8);
  const Shape &shape = op[var].shape;
  Shape places = op[indices].shape;
  int64_t depth = 1;
  auto expected = [&] {
    Shape result = places;
    result.insert(result.end(), shape.begin() + depth, shape.end());
    return result;
  };
  const bool rows = op[updates].shape != expected();
  if (rows) {
    depth = places.back();
    places.pop_back();
    op.require(depth <= op[var].rank(), "a row of indices has %ld numbers, varRef %ld dimensions", long(depth),
               long(op[var].rank()));
  }
  op.shape(updates, expected());
  const int64_t slices = product(places);
  op.run([=](const Tensors &t) {
    const auto index = read<int64_t>(t[indices]);
    auto sum = [&](auto zero) {
      using Number = decltype(zero);
      auto total = read<Number>(t[var]);
      const auto values = read<Number>(t[updates]);
      const int64_t width = slices > 0 ? values.size() / slices : 0;
      for (int64_t i = 0; i < slices; ++i) {
        int64_t at = 0;
        for (int64_t k = 0; k < depth; ++k) {
          const int64_t place = index[i * depth + k];
          if (place < 0 || place >= t[var].dim(k)) {
            fail("index %ld is outside dimension %ld of %ld", long(place), long(k), long(t[var].dim(k)));
          }
          at = at * t[var].dim(k) + place;
        }
        for (int64_t j = 0; j < width; ++j) total[at * width + j] += values[i * width + j];
      }
      write(t[var], total);
    };
    is_float(t[var].type) ? sum(0.0f) : sum(int64_t{0});
  });
}

}  // namespace
}  // namespace sim

SIM_OPERATOR(aclnnTfScatterAdd)
extern "C" int aclnnTfScatterAddGetWorkspaceSize(aclTensor *var, const aclTensor *indices, const aclTensor *updates,
                                                 uint64_t *workspace, aclOpExecutor **executor) {
  return sim::plan("aclnnTfScatterAdd", workspace, executor, [&](sim::Op &op) {
    const int v = op.output("varRef", var), i = op.input("indices", indices), u = op.input("updates", updates);
    sim::scatter_add(op, v, i, u);
  });
}
