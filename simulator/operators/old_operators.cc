// Operators that MindSpore calls by the old road (aclopCompileAndExecuteV2): the table, and how their calls are read.
#include "old_operators.h"

#include <algorithm>

namespace sim {

OldOperator of(std::vector<DType> types, OldOperator body) {
  return [types = std::move(types), body = std::move(body)](Op &op, const Indices &in, const Indices &out,
                                                            const Attributes &attributes) {
    for (int i : out) {
      op.require(!op[i] || std::find(types.begin(), types.end(), op[i].type) != types.end(),
                 "the card has no such operator for %s", name_of(op[i].type));
    }
    body(op, in, out, attributes);
  };
}

double attribute_of(const Attributes &attributes, const char *name, double otherwise) {
  const auto found = attributes.find(name);
  return found == attributes.end() ? otherwise : found->second.number();
}

Shape list_of(const Attributes &attributes, const char *name) {
  const auto found = attributes.find(name);
  if (found == attributes.end()) return {};
  return Shape(found->second.numbers.begin(), found->second.numbers.end());
}

void require_inputs(const Op &op, const Indices &in, size_t least) {
  op.require(in.size() >= least, "%zu inputs are needed, not %zu", least, in.size());
}

Shape constant(const Op &op, int index) {
  op.require(op[index].on_host, "%s must be a constant", op.names[index].c_str());
  return read<int64_t>(op[index]);
}

int64_t checked_axis(const Op &op, int64_t axis, int64_t rank) {
  op.require(axis >= -rank && axis < rank, "axis %ld is outside a tensor of %ld", axis, rank);
  return axis < 0 ? axis + rank : axis;
}

const std::map<std::string, OldOperator> &old_operators() {
  static const auto &table = *[] {
    auto *all = new std::map<std::string, OldOperator>;
    for (const OldTable &part : {old_arithmetic(), old_moves()}) all->insert(part.begin(), part.end());
    return all;
  }();
  return table;
}

}  // namespace sim
