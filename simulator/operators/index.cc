// Operators that pick or place elements by indices: gather, embedding, scatter, sorting, masks.
// Sources: headers aclnn_*.h of CANN 8.1 and the documentation of ops-nn. An index outside its axis is an error here;
// the card reads or writes past the tensor.
#include "index.h"

#include <algorithm>
#include <numeric>

#include "elementwise.h"

namespace sim {

int64_t checked_index(int64_t index, int64_t length) {
  if (index < -length || index >= length) fail("index %ld is outside an axis of %ld", index, length);
  return index < 0 ? index + length : index;
}

void take(const Tensor &x, int64_t axis, const std::vector<int64_t> &indices, const Tensor &out) {
  const int64_t rank = x.rank(), length = x.shape[axis], count = indices.size();
  const int64_t before = product({x.shape.begin(), x.shape.begin() + axis});
  const int64_t after = product({x.shape.begin() + axis + 1, x.shape.end()});
  if (axis == 0 && rank == 2 && x.contiguous() && out.contiguous() && x.type == out.type) {  // rows of a table
    const size_t bytes = after * size_of(x.type);
    const char *from = static_cast<const char *>(x.data) + x.offset * size_of(x.type);
    char *to = static_cast<char *>(out.data) + out.offset * size_of(out.type);
    for (int64_t i = 0; i < count; ++i) memcpy(to + i * bytes, from + checked_index(indices[i], length) * bytes, bytes);
    return;
  }
  in_arithmetic(arithmetic_of({x.type}), [&](auto zero) {
    using Number = decltype(zero);
    const auto values = read<Number>(x);
    std::vector<Number> taken(before * count * after);
    for (int64_t i = 0; i < before; ++i) {
      for (int64_t j = 0; j < count; ++j) {
        const auto from = values.begin() + (i * length + checked_index(indices[j], length)) * after;
        std::copy(from, from + after, taken.begin() + (i * count + j) * after);
      }
    }
    write(out, taken);
  });
}

void add_rows(const Tensor &rows, const std::vector<int64_t> &indices, int64_t skipped, const Tensor &out) {
  const int64_t count = out.shape[0], width = count ? out.size() / count : 0;
  in_arithmetic(arithmetic_of({out.type}), [&](auto zero) {
    using Number = decltype(zero);
    const auto values = read<Number>(rows);
    auto sums = std::vector<Number>(out.size());
    for (size_t i = 0; i < indices.size(); ++i) {
      if (indices[i] == skipped) continue;
      if (indices[i] < 0 || indices[i] >= count) fail("row %ld is outside 0 to %ld", indices[i], count - 1);
      Number *sum = sums.data() + indices[i] * width;
      for (int64_t j = 0; j < width; ++j) sum[j] += values[i * width + j];
    }
    write(out, sums);
  });
}

namespace {

// Calls function(place in the indices, place in x with the index along the axis) for each element of `indices`.
template <class Function>
void for_each_index(const Tensor &x, int64_t axis, const Tensor &indices, Function function) {
  const auto values = read<int64_t>(indices);
  const Shape steps = row_major(x.shape), own = row_major(indices.shape);
  for (int64_t i = 0; i < int64_t(values.size()); ++i) {
    int64_t place = 0;
    for (int64_t k = 0; k < x.rank(); ++k) {
      place += (k == axis ? checked_index(values[i], x.shape[k]) : i / own[k] % indices.shape[k]) * steps[k];
    }
    function(i, place);
  }
}

int64_t axis_of(const Op &op, int64_t axis, int64_t rank) {
  op.require(axis >= -rank && axis < rank, "axis %ld is outside a tensor of %ld", axis, rank);
  return axis < 0 ? axis + rank : axis;
}

Shape taken_shape(const Shape &x, int64_t axis, const Shape &indices) {
  Shape shape(x.begin(), x.begin() + axis);
  shape.insert(shape.end(), indices.begin(), indices.end());
  shape.insert(shape.end(), x.begin() + axis + 1, x.end());
  return shape;
}

// out = x, with the source's elements put in or added at the indices along an axis.
int scatter(const char *name, const aclTensor *self, int64_t dim, const aclTensor *index, const aclTensor *source,
            const aclTensor *out, bool add, uint64_t *workspace, aclOpExecutor **executor) {
  return plan(name, workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), n = op.input("index", index), s = op.input("src", source),
              y = op.output("out", out);
    const int64_t axis = axis_of(op, op.setting("dim", dim), op[x].rank());
    op.types(n, {INT32, INT64});
    op.rank(n, op[x].rank(), op[x].rank());
    op.shape(y, op[x].shape);
    op.shape(s, op[n].shape);
    op.run([=](const Tensors &t) {
      in_arithmetic(arithmetic_of({t[x].type}), [&](auto zero) {
        using Number = decltype(zero);
        auto values = read<Number>(t[x]);
        const auto sources = read<Number>(t[s]);
        for_each_index(t[x], axis, t[n], [&](int64_t from, int64_t to) {
          values[to] = add ? values[to] + sources[from] : sources[from];
        });
        write(t[y], values);
      });
    });
  });
}

// Along the last axis after a swap: the `count` first in order, and where they were.
void sort_rows(const Tensor &x, int64_t axis, int64_t count, bool falling, const Tensor &values_out,
               const Tensor &places_out) {
  const auto view = [&](const Tensor &tensor) { return transpose(tensor, axis, tensor.rank() - 1); };
  const auto values = read<double>(view(x));
  const int64_t length = x.shape[axis];
  std::vector<double> sorted;
  std::vector<int64_t> places, order(length);
  for (int64_t begin = 0; begin < int64_t(values.size()); begin += length) {
    const double *row = values.data() + begin;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return falling ? row[a] > row[b] : row[a] < row[b]; });
    for (int64_t i = 0; i < count; ++i) sorted.push_back(row[order[i]]), places.push_back(order[i]);
  }
  write(view(values_out), sorted);
  write(view(places_out), places);
}

}  // namespace
}  // namespace sim

using namespace sim;

SIM_OPERATOR(aclnnIndexSelect)
extern "C" int aclnnIndexSelectGetWorkspaceSize(const aclTensor *self, int64_t dim, const aclTensor *index,
                                                aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnIndexSelect", workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), n = op.input("index", index), y = op.output("out", out);
    const int64_t axis = axis_of(op, op.setting("dim", dim), op[x].rank());
    op.types(n, {INT32, INT64});
    op.rank(n, 0, 1);
    op.types(y, {op[x].type});
    op.shape(y, taken_shape(op[x].shape, axis, {op[n].size()}));
    op.run([=](const Tensors &t) { take(t[x], axis, read<int64_t>(t[n]), t[y]); });
  });
}

SIM_OPERATOR(aclnnEmbedding)
extern "C" int aclnnEmbeddingGetWorkspaceSize(const aclTensor *weight, const aclTensor *indices, const aclTensor *out,
                                              uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnEmbedding", workspace, executor, [&](Op &op) {
    const int x = op.input("weight", weight), n = op.input("indices", indices), y = op.output("out", out);
    op.types(n, {INT32, INT64});
    op.rank(x, 2, 2);
    op.types(y, {op[x].type});
    op.shape(y, taken_shape(op[x].shape, 0, op[n].shape));
    op.run([=](const Tensors &t) { take(t[x], 0, read<int64_t>(t[n]), t[y]); });
  });
}

SIM_OPERATOR(aclnnEmbeddingDenseBackward)
extern "C" int aclnnEmbeddingDenseBackwardGetWorkspaceSize(const aclTensor *gradient, const aclTensor *indices,
                                                           uint64_t rows, uint64_t padding, bool scaled,
                                                           const aclTensor *out, uint64_t *workspace,
                                                           aclOpExecutor **executor) {
  return plan("aclnnEmbeddingDenseBackward", workspace, executor, [&](Op &op) {
    const int d = op.input("grad", gradient), n = op.input("indices", indices), y = op.output("out", out);
    const int64_t skipped = op.setting("paddingIdx", int64_t(padding));
    op.require(!op.setting("scaleGradByFreq", scaled), "scaleGradByFreq is not simulated");
    op.types(d, {FLOAT32, FLOAT16, BFLOAT16});
    op.types(n, {INT32, INT64});
    op.require(op[d].rank() > 0, "grad has no rows");
    op.shape(y, {op.setting("numWeights", int64_t(rows)), op[d].dim(-1)});
    op.require(op[d].size() == op[n].size() * op[d].dim(-1), "grad has no row for each index");
    op.run([=](const Tensors &t) { add_rows(t[d], read<int64_t>(t[n]), skipped, t[y]); });
  });
}

SIM_OPERATOR(aclnnGather)
extern "C" int aclnnGatherGetWorkspaceSize(const aclTensor *self, int64_t dim, const aclTensor *index, aclTensor *out,
                                           uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnGather", workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), n = op.input("index", index), y = op.output("out", out);
    const int64_t axis = axis_of(op, op.setting("dim", dim), op[x].rank());
    op.types(n, {INT32, INT64});
    op.rank(n, op[x].rank(), op[x].rank());
    op.shape(y, op[n].shape);
    op.types(y, {op[x].type});
    op.run([=](const Tensors &t) {
      in_arithmetic(arithmetic_of({t[x].type}), [&](auto zero) {
        const auto values = read<decltype(zero)>(t[x]);
        std::vector<decltype(zero)> taken(t[n].size());
        for_each_index(t[x], axis, t[n], [&](int64_t to, int64_t from) { taken[to] = values[from]; });
        write(t[y], taken);
      });
    });
  });
}

SIM_OPERATOR(aclnnScatter)
extern "C" int aclnnScatterGetWorkspaceSize(const aclTensor *self, int64_t dim, const aclTensor *index,
                                            const aclTensor *source, int64_t reduce, aclTensor *out,
                                            uint64_t *workspace, aclOpExecutor **executor) {
  return scatter("aclnnScatter", self, dim, index, source, out, reduce == 1, workspace, executor);
}

SIM_OPERATOR(aclnnInplaceScatter)
extern "C" int aclnnInplaceScatterGetWorkspaceSize(aclTensor *self, int64_t dim, const aclTensor *index,
                                                   const aclTensor *source, int64_t reduce, uint64_t *workspace,
                                                   aclOpExecutor **executor) {
  return scatter("aclnnInplaceScatter", self, dim, index, source, self, reduce == 1, workspace, executor);
}

SIM_OPERATOR(aclnnScatterAdd)
extern "C" int aclnnScatterAddGetWorkspaceSize(const aclTensor *self, int64_t dim, const aclTensor *index,
                                               const aclTensor *source, aclTensor *out, uint64_t *workspace,
                                               aclOpExecutor **executor) {
  return scatter("aclnnScatterAdd", self, dim, index, source, out, true, workspace, executor);
}

SIM_OPERATOR(aclnnTopk)
extern "C" int aclnnTopkGetWorkspaceSize(const aclTensor *self, int64_t k, int64_t dim, bool largest, bool sorted,
                                         aclTensor *values, aclTensor *indices, uint64_t *workspace,
                                         aclOpExecutor **executor) {
  return plan("aclnnTopk", workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), y = op.output("valuesOut", values), n = op.output("indicesOut", indices);
    const int64_t axis = axis_of(op, op.setting("dim", dim), op[x].rank()), count = op.setting("k", k);
    op.setting("largest", largest), op.setting("sorted", sorted);
    op.require(count >= 0 && count <= op[x].shape[axis], "k is above the axis's %ld", op[x].shape[axis]);
    Shape expected = op[x].shape;
    expected[axis] = count;
    for (int i : {y, n}) op.shape(i, expected);
    op.types(n, {INT64});
    op.run([=](const Tensors &t) { sort_rows(t[x], axis, count, largest, t[y], t[n]); });
  });
}

SIM_OPERATOR(aclnnSort)
extern "C" int aclnnSortGetWorkspaceSize(const aclTensor *self, bool stable, int64_t dim, bool falling,
                                         aclTensor *values, aclTensor *indices, uint64_t *workspace,
                                         aclOpExecutor **executor) {
  return plan("aclnnSort", workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), y = op.output("valuesOut", values), n = op.output("indicesOut", indices);
    const int64_t axis = axis_of(op, op.setting("dim", dim), op[x].rank());
    op.setting("stable", stable), op.setting("descending", falling);
    for (int i : {y, n}) op.shape(i, op[x].shape);
    op.types(n, {INT64});
    op.run([=](const Tensors &t) { sort_rows(t[x], axis, t[x].shape[axis], falling, t[y], t[n]); });
  });
}

SIM_OPERATOR(aclnnInplaceMaskedFillScalar)
extern "C" int aclnnInplaceMaskedFillScalarGetWorkspaceSize(aclTensor *self, const aclTensor *mask,
                                                            const aclScalar *value, uint64_t *workspace,
                                                            aclOpExecutor **executor) {
  return plan("aclnnInplaceMaskedFillScalar", workspace, executor, [&](Op &op) {
    const int x = op.output("selfRef", self), m = op.input("mask", mask);
    const double number = op.number("value", value);
    op.types(m, {BOOL});
    broadcast(op[m], op[x].shape);
    op.run([=](const Tensors &t) {
      map(arithmetic_of({t[x].type}), t[x], t[m], t[x],
          [=](auto kept, auto hidden) { return hidden != 0 ? static_cast<decltype(kept)>(number) : kept; });
    });
  });
}
