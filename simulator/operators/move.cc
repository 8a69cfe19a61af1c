// Operators that move elements and do not change them: conversions, copies, fills, joining, splitting, reordering.
// Sources: headers aclnn_*.h of CANN 8.1 and the documentation of ops-math.
#include <numeric>

#include "elementwise.h"

namespace sim {
namespace {

int fill(const char *name, const aclTensor *self, double number, int64_t integer, uint64_t *workspace,
         aclOpExecutor **executor) {
  return plan(name, workspace, executor, [&](Op &op) {
    const int x = op.output("selfRef", self);
    op.setting("value", number);
    op.run([=](const Tensors &t) {
      if (is_float(t[x].type)) write(t[x], std::vector<double>(t[x].size(), number));
      else write(t[x], std::vector<int64_t>(t[x].size(), integer));
    });
  });
}

int64_t axis_of(const Op &op, int64_t axis, int64_t rank) {
  op.require(axis >= -rank && axis < rank, "axis %ld is outside a tensor of %ld", axis, rank);
  return axis < 0 ? axis + rank : axis;
}

void split_into(Op &op, int x, int64_t axis, const Shape &lengths, const std::vector<int> &parts) {
  op.require(parts.size() == lengths.size(), "%zu parts for %zu lengths", parts.size(), lengths.size());
  op.require(std::accumulate(lengths.begin(), lengths.end(), int64_t{0}) == op[x].dim(axis),
             "the parts of axis %ld do not add up to %ld", axis, op[x].dim(axis));
  for (size_t i = 0; i < parts.size(); ++i) {
    Shape expected = op[x].shape;
    expected[axis] = lengths[i];
    op.shape(parts[i], expected);
  }
  op.run([=](const Tensors &t) {
    int64_t begin = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
      copy(t[parts[i]], slice(t[x], axis, begin, lengths[i]));
      begin += lengths[i];
    }
  });
}

// The part of each matrix above (or below) a diagonal, zeros elsewhere.
int triangle(const char *name, const aclTensor *self, int64_t diagonal, bool upper, aclTensor *out,
             uint64_t *workspace, aclOpExecutor **executor) {
  return plan(name, workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), y = op.output("out", out);
    op.setting("diagonal", diagonal);
    op.rank(x, 2, 8);
    op.shape(y, op[x].shape);
    op.run([=](const Tensors &t) {
      const int64_t rows = t[x].dim(-2), columns = t[x].dim(-1);
      auto values = read<double>(t[x]);
      for (int64_t i = 0; i < int64_t(values.size()); ++i) {
        const int64_t distance = i % columns - i / columns % rows;
        if (upper ? distance < diagonal : distance > diagonal) values[i] = 0;
      }
      write(t[y], values);
    });
  });
}

}  // namespace
}  // namespace sim

using namespace sim;

SIM_OPERATOR(aclnnCast)
extern "C" int aclnnCastGetWorkspaceSize(const aclTensor *self, int dtype, aclTensor *out, uint64_t *workspace,
                                         aclOpExecutor **executor) {
  return plan("aclnnCast", workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), y = op.output("out", out);
    op.shape(y, op[x].shape);
    op.types(y, {static_cast<DType>(dtype)});
    op.run([=](const Tensors &t) { copy(t[y], t[x]); });
  });
}

SIM_OPERATOR(aclnnInplaceCopy)
extern "C" int aclnnInplaceCopyGetWorkspaceSize(aclTensor *self, const aclTensor *source, uint64_t *workspace,
                                                aclOpExecutor **executor) {
  return plan("aclnnInplaceCopy", workspace, executor, [&](Op &op) {
    const int x = op.input("src", source), y = op.output("selfRef", self);
    broadcast(op[x], op[y].shape);
    op.run([=](const Tensors &t) { copy(t[y], broadcast(t[x], t[y].shape)); });
  });
}

SIM_OPERATOR(aclnnInplaceZero)
extern "C" int aclnnInplaceZeroGetWorkspaceSize(aclTensor *self, uint64_t *workspace, aclOpExecutor **executor) {
  return fill("aclnnInplaceZero", self, 0, 0, workspace, executor);
}

SIM_OPERATOR(aclnnInplaceOne)
extern "C" int aclnnInplaceOneGetWorkspaceSize(const aclTensor *self, uint64_t *workspace, aclOpExecutor **executor) {
  return fill("aclnnInplaceOne", self, 1, 1, workspace, executor);
}

SIM_OPERATOR(aclnnInplaceFillScalar)
extern "C" int aclnnInplaceFillScalarGetWorkspaceSize(aclTensor *self, const aclScalar *value, uint64_t *workspace,
                                                      aclOpExecutor **executor) {
  return fill("aclnnInplaceFillScalar", self, value->number, value->integer, workspace, executor);
}

SIM_OPERATOR(aclnnInplaceFillTensor)
extern "C" int aclnnInplaceFillTensorGetWorkspaceSize(aclTensor *self, const aclTensor *value, uint64_t *workspace,
                                                      aclOpExecutor **executor) {
  return plan("aclnnInplaceFillTensor", workspace, executor, [&](Op &op) {
    const int x = op.input("value", value), y = op.output("selfRef", self);
    op.require(op[x].size() == 1, "value has more than one element");
    op.run([=](const Tensors &t) { copy(t[y], broadcast(t[x], t[y].shape)); });
  });
}

SIM_OPERATOR(aclnnCat)
extern "C" int aclnnCatGetWorkspaceSize(const aclTensorList *tensors, int64_t dim, aclTensor *out,
                                        uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnCat", workspace, executor, [&](Op &op) {
    const std::vector<int> parts = op.inputs("tensors", tensors);
    const int y = op.output("out", out);
    const int64_t axis = axis_of(op, op.setting("dim", dim), op[y].rank());
    int64_t total = 0;
    for (int part : parts) {
      if (op[part].shape == Shape{0}) continue;
      op.require(op[part].rank() == op[y].rank(), "the tensors differ in rank");
      Shape expected = op[y].shape;
      total += expected[axis] = op[part].shape[axis];
      op.shape(part, expected);
    }
    op.require(total == op[y].shape[axis], "the tensors have %ld along axis %ld, out %ld", total, axis,
               op[y].shape[axis]);
    op.run([=](const Tensors &t) {
      int64_t begin = 0;
      for (int part : parts) {
        if (t[part].size() == 0) continue;
        copy(slice(t[y], axis, begin, t[part].shape[axis]), t[part]);
        begin += t[part].shape[axis];
      }
    });
  });
}

SIM_OPERATOR(aclnnStack)
extern "C" int aclnnStackGetWorkspaceSize(const aclTensorList *tensors, int64_t dim, aclTensor *out,
                                          uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnStack", workspace, executor, [&](Op &op) {
    const std::vector<int> parts = op.inputs("tensors", tensors);
    const int y = op.output("out", out);
    const int64_t axis = axis_of(op, op.setting("dim", dim), op[y].rank());
    Shape one = op[y].shape;
    one.erase(one.begin() + axis);
    op.require(op[y].shape[axis] == int64_t(parts.size()), "out does not hold %zu tensors", parts.size());
    for (int part : parts) op.shape(part, one);
    op.run([=](const Tensors &t) {
      Shape with_axis = one;
      with_axis.insert(with_axis.begin() + axis, 1);
      for (size_t i = 0; i < parts.size(); ++i) {
        Tensor part = t[parts[i]];
        part.shape = with_axis;
        part.strides.insert(part.strides.begin() + axis, 0);
        copy(slice(t[y], axis, i, 1), part);
      }
    });
  });
}

SIM_OPERATOR(aclnnSplitWithSize)
extern "C" int aclnnSplitWithSizeGetWorkspaceSize(const aclTensor *self, const aclIntArray *sizes, int64_t dim,
                                                  aclTensorList *out, uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnSplitWithSize", workspace, executor, [&](Op &op) {
    const int x = op.input("self", self);
    const std::vector<int> parts = op.outputs("out", out);
    const Shape lengths = op.setting("splitSize", sizes);
    split_into(op, x, axis_of(op, op.setting("dim", dim), op[x].rank()), lengths, parts);
  });
}

SIM_OPERATOR(aclnnSplitTensor)
extern "C" int aclnnSplitTensorGetWorkspaceSize(const aclTensor *self, uint64_t length, int64_t dim,
                                                aclTensorList *out, uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnSplitTensor", workspace, executor, [&](Op &op) {
    const int x = op.input("self", self);
    const std::vector<int> parts = op.outputs("out", out);
    const int64_t axis = axis_of(op, op.setting("dim", dim), op[x].rank());
    const int64_t step = op.setting("splitSections", int64_t(length)), all = op[x].shape[axis];
    op.require(step > 0, "splitSections must be above 0");
    Shape lengths;
    for (int64_t begin = 0; begin < all; begin += step) lengths.push_back(std::min(step, all - begin));
    split_into(op, x, axis, lengths, parts);
  });
}

SIM_OPERATOR(aclnnPermute)
extern "C" int aclnnPermuteGetWorkspaceSize(const aclTensor *self, const aclIntArray *dims, aclTensor *out,
                                            uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnPermute", workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), y = op.output("out", out);
    Shape axes = op.setting("dims", dims);
    op.require(int64_t(axes.size()) == op[x].rank(), "%zu axes for a tensor of %ld", axes.size(), op[x].rank());
    for (auto &axis : axes) axis = axis_of(op, axis, op[x].rank());
    op.shape(y, permute(op[x], axes).shape);
    op.run([=](const Tensors &t) { copy(t[y], permute(t[x], axes)); });
  });
}

SIM_OPERATOR(aclnnExpand)
extern "C" int aclnnExpandGetWorkspaceSize(const aclTensor *self, const aclIntArray *size, aclTensor *out,
                                           uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnExpand", workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), y = op.output("out", out);
    op.setting("size", size);
    broadcast(op[x], op[y].shape);
    op.run([=](const Tensors &t) { copy(t[y], broadcast(t[x], t[y].shape)); });
  });
}

SIM_OPERATOR(aclnnRepeat)
extern "C" int aclnnRepeatGetWorkspaceSize(const aclTensor *self, const aclIntArray *repeats, aclTensor *out,
                                           uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnRepeat", workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), y = op.output("out", out);
    const Shape times = op.setting("repeats", repeats);
    const int64_t rank = times.size(), added = rank - op[x].rank();
    op.require(added >= 0, "%ld repeats for a tensor of %ld axes", rank, op[x].rank());
    Shape expected = times, period(rank, 1);
    for (int64_t i = added; i < rank; ++i) expected[i] *= period[i] = op[x].shape[i - added];
    op.shape(y, expected);
    op.run([=](const Tensors &t) {
      for (int64_t number = 0; number < product(times); ++number) {
        Tensor part = t[y];
        int64_t rest = number;
        for (int64_t i = rank - 1; i >= 0; --i) {
          part = slice(part, i, rest % times[i] * period[i], period[i]);
          rest /= times[i];
        }
        copy(part, broadcast(t[x], period));
      }
    });
  });
}

SIM_OPERATOR(aclnnSlice)
extern "C" int aclnnSliceGetWorkspaceSize(const aclTensor *self, int64_t dim, int64_t start, int64_t end, int64_t step,
                                          aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnSlice", workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), y = op.output("out", out);
    const int64_t axis = axis_of(op, op.setting("dim", dim), op[x].rank()), length = op[x].shape[axis];
    const auto place = [&](int64_t at) { return std::clamp<int64_t>(at < 0 ? at + length : at, 0, length); };
    const int64_t begin = place(op.setting("start", start)), stop = place(op.setting("end", end));
    op.require(op.setting("step", step) > 0, "step must be above 0");
    Shape expected = op[x].shape;
    expected[axis] = std::max<int64_t>(0, (stop - begin + step - 1) / step);
    op.shape(y, expected);
    op.run([=](const Tensors &t) { copy(t[y], slice(t[x], axis, begin, expected[axis], step)); });
  });
}

SIM_OPERATOR(aclnnTriu)
extern "C" int aclnnTriuGetWorkspaceSize(const aclTensor *self, int64_t diagonal, aclTensor *out, uint64_t *workspace,
                                         aclOpExecutor **executor) {
  return triangle("aclnnTriu", self, diagonal, true, out, workspace, executor);
}

SIM_OPERATOR(aclnnTril)
extern "C" int aclnnTrilGetWorkspaceSize(const aclTensor *self, int64_t diagonal, aclTensor *out, uint64_t *workspace,
                                         aclOpExecutor **executor) {
  return triangle("aclnnTril", self, diagonal, false, out, workspace, executor);
}

SIM_OPERATOR(aclnnArange)
extern "C" int aclnnArangeGetWorkspaceSize(const aclScalar *start, const aclScalar *end, const aclScalar *step,
                                           aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnArange", workspace, executor, [&](Op &op) {
    const int y = op.output("out", out);
    const double first = op.number("start", start), last = op.number("end", end), by = op.number("step", step);
    op.require(by != 0 && (last - first) / by >= 0, "step does not lead from start to end");
    op.shape(y, {static_cast<int64_t>(std::ceil((last - first) / by))});
    op.run([=](const Tensors &t) {
      std::vector<double> values(t[y].size());
      for (size_t i = 0; i < values.size(); ++i) values[i] = first + i * by;
      write(t[y], values);
    });
  });
}
