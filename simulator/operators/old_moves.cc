// Old operators that move elements: gathers and scatters, splits and joins, slices and their gradient.
#include <algorithm>

#include "elementwise.h"
#include "index.h"
#include "old_operators.h"

namespace sim {
namespace {

void gather(Op &op, const Indices &in, const Indices &out, const Attributes &attributes) {
  require_inputs(op, in, 3);
  op.require(attribute_of(attributes, "batch_dims", 0) == 0, "batch_dims is not simulated");
  const int x = in[0], n = in[1], y = out[0];
  op.types(n, {INT32, INT64});
  const int64_t axis = checked_axis(op, constant(op, in[2]).at(0), op[x].rank());
  op.require(op[y].size() == op[x].size() / std::max<int64_t>(1, op[x].shape[axis]) * op[n].size(),
             "the output does not hold what is gathered");
  op.run([=](const Tensors &t) { take(t[x], axis, read<int64_t>(t[n]), t[y]); });
}

void gather_nd(Op &op, const Indices &in, const Indices &out, const Attributes &) {
  require_inputs(op, in, 2);
  const int x = in[0], n = in[1], y = out[0];
  const int64_t depth = op[n].dim(-1);
  op.require(depth <= op[x].rank(), "indices of %ld for a tensor of %ld axes", depth, op[x].rank());
  const int64_t width = product({op[x].shape.begin() + depth, op[x].shape.end()});
  op.require(op[y].size() == op[n].size() / std::max<int64_t>(1, depth) * width, "the output does not hold the result");
  op.run([=](const Tensors &t) {
    const auto indices = read<int64_t>(t[n]);
    const auto values = read<double>(t[x]);
    std::vector<double> taken;
    for (size_t i = 0; i + depth <= indices.size(); i += depth) {
      int64_t place = 0;
      for (int64_t k = 0; k < depth; ++k) {
        place = place * t[x].shape[k] + checked_index(indices[i + k], t[x].shape[k]);
      }
      taken.insert(taken.end(), values.begin() + place * width, values.begin() + (place + 1) * width);
    }
    write(t[y], taken);
  });
}

// x with slices along its first axes added to, or replaced, at indices (…, depth).
OldOperator scatter_nd(bool add) {
  return [=](Op &op, const Indices &in, const Indices &out, const Attributes &) {
    require_inputs(op, in, 3);
    const int x = in[0], n = in[1], s = in[2], y = out[0];
    op.shape(y, op[x].shape);
    const int64_t depth = op[n].dim(-1);
    const int64_t width = product({op[x].shape.begin() + depth, op[x].shape.end()});
    op.run([=](const Tensors &t) {
      const auto indices = read<int64_t>(t[n]);
      auto values = read<double>(t[x]);
      const auto updates = read<double>(t[s]);
      for (size_t i = 0; (i + 1) * depth <= indices.size(); ++i) {
        int64_t place = 0;
        for (int64_t k = 0; k < depth; ++k) {
          place = place * t[x].shape[k] + checked_index(indices[i * depth + k], t[x].shape[k]);
        }
        for (int64_t j = 0; j < width; ++j) {
          values[place * width + j] = (add ? values[place * width + j] : 0) + updates[i * width + j];
        }
      }
      write(t[y], values);
    });
  };
}

void split(Op &op, const Indices &in, const Indices &out, const Attributes &attributes) {
  require_inputs(op, in, 1);
  const int x = in.back();
  const int64_t given = in.size() > 1 ? constant(op, in[0]).at(0) : attribute_of(attributes, "split_dim", 0);
  const int64_t axis = checked_axis(op, given, op[x].rank());
  op.require(op[x].shape[axis] % out.size() == 0, "axis %ld of %ld cannot be split in %zu", axis, op[x].shape[axis],
             out.size());
  const int64_t length = op[x].shape[axis] / out.size();
  op.run([=](const Tensors &t) {
    for (size_t i = 0; i < out.size(); ++i) copy(t[out[i]], slice(t[x], axis, i * length, length));
  });
}

void pack(Op &op, const Indices &in, const Indices &out, const Attributes &attributes) {
  require_inputs(op, in, 1);
  const int y = out[0];
  const int64_t axis = checked_axis(op, attribute_of(attributes, "axis", 0), op[y].rank());
  op.require(op[y].shape[axis] == int64_t(in.size()), "the output does not hold %zu tensors", in.size());
  op.run([=](const Tensors &t) {
    for (size_t i = 0; i < in.size(); ++i) {
      Tensor part = t[in[i]];
      part.shape.insert(part.shape.begin() + axis, 1);
      part.strides.insert(part.strides.begin() + axis, 0);
      copy(slice(t[y], axis, i, 1), part);
    }
  });
}

// What begin, end, strides and their masks pick from a shape: axis by axis a first place, a length and a step.
struct Stride {
  int64_t begin, length, step;
};

std::vector<Stride> strides_of(const Op &op, const Shape &shape, const Shape &begin, const Shape &end,
                               const Shape &step, const Attributes &attributes) {
  const int64_t begin_mask = attribute_of(attributes, "begin_mask", 0);
  const int64_t end_mask = attribute_of(attributes, "end_mask", 0);
  const int64_t shrink = attribute_of(attributes, "shrink_axis_mask", 0);
  op.require(attribute_of(attributes, "ellipsis_mask", 0) == 0 && attribute_of(attributes, "new_axis_mask", 0) == 0,
             "ellipsis_mask and new_axis_mask are not simulated");
  std::vector<Stride> picked;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i >= begin.size()) {
      picked.push_back({0, shape[i], 1});
      continue;
    }
    const int64_t by = step[i], length = shape[i];
    op.require(by > 0, "steps below 1 are not simulated");
    const auto place = [&](int64_t at) { return std::clamp<int64_t>(at < 0 ? at + length : at, 0, length); };
    const int64_t first = begin_mask >> i & 1 ? 0 : place(begin[i]);
    const int64_t last = shrink >> i & 1 ? first + 1 : end_mask >> i & 1 ? length : place(end[i]);
    picked.push_back({first, std::max<int64_t>(0, (last - first + by - 1) / by), by});
  }
  return picked;
}

Tensor strided(Tensor view, const std::vector<Stride> &picked) {
  for (size_t i = 0; i < picked.size(); ++i) view = slice(view, i, picked[i].begin, picked[i].length, picked[i].step);
  return view;
}

// The tensor with the shape of a view of as many elements (an axis of one may be gone).
Tensor reshaped(Tensor tensor, const Shape &shape) {
  if (product(shape) != tensor.size() || !tensor.contiguous()) fail("%s does not hold the slice", text(tensor).c_str());
  tensor.shape = shape;
  tensor.strides = row_major(shape);
  return tensor;
}

void strided_slice(Op &op, const Indices &in, const Indices &out, const Attributes &attributes) {
  require_inputs(op, in, 4);
  const int x = in[0], y = out[0];
  const auto picked = strides_of(op, op[x].shape, constant(op, in[1]), constant(op, in[2]), constant(op, in[3]),
                                 attributes);
  op.require(op[y].size() == strided(op[x], picked).size(), "the output does not hold the slice");
  op.run([=](const Tensors &t) {
    const Tensor view = strided(t[x], picked);
    copy(reshaped(t[y], view.shape), view);
  });
}

void strided_slice_gradient(Op &op, const Indices &in, const Indices &out, const Attributes &attributes) {
  require_inputs(op, in, 5);
  const int dy = in[4], dx = out[0];
  op.shape(dx, constant(op, in[0]));
  const auto picked = strides_of(op, op[dx].shape, constant(op, in[1]), constant(op, in[2]), constant(op, in[3]),
                                 attributes);
  op.require(op[dy].size() == strided(op[dx], picked).size(), "the gradient does not have the slice's size");
  op.run([=](const Tensors &t) {
    write(t[dx], std::vector<float>(t[dx].size()));
    const Tensor view = strided(t[dx], picked);
    copy(view, reshaped(t[dy], view.shape));
  });
}

void unsorted_segment_sum(Op &op, const Indices &in, const Indices &out, const Attributes &) {
  require_inputs(op, in, 2);
  const int x = in[0], n = in[1], y = out[0];
  op.types(n, {INT32, INT64});
  op.types(y, {op[x].type});
  const int64_t width = product({op[y].shape.begin() + 1, op[y].shape.end()});
  op.require(op[x].size() == op[n].size() * width, "there is no row for each index");
  op.run([=](const Tensors &t) { add_rows(t[x], read<int64_t>(t[n]), -1, t[y]); });
}

void scatter_update(Op &op, const Indices &in, const Indices &out, const Attributes &) {
  require_inputs(op, in, 3);
  const int x = in[0], n = in[1], s = in[2];
  op.types(n, {INT32, INT64});
  op.types(s, {op[x].type});
  const int64_t width = product({op[x].shape.begin() + 1, op[x].shape.end()});
  op.require(op[s].size() == op[n].size() * width, "there is no row for each index");
  op.run([=](const Tensors &t) {
    const auto indices = read<int64_t>(t[n]);
    const Tensor rows = reshaped(t[x], {t[x].shape[0], width});
    const Tensor updates = reshaped(t[s], {int64_t(indices.size()), width});
    for (size_t i = 0; i < indices.size(); ++i) {
      copy(slice(rows, 0, checked_index(indices[i], rows.shape[0]), 1), slice(updates, 0, i, 1));
    }
    for (int z : out) {
      if (t[z] && t[z].data != t[x].data) copy(t[z], t[x]);
    }
  });
}

void turn(Op &op, const Indices &in, const Indices &out, const Attributes &attributes) {
  require_inputs(op, in, 1);
  const int x = in[0], y = out[0];
  const Shape axes = in.size() > 1 ? constant(op, in[1]) : list_of(attributes, "perm");
  op.shape(y, permute(op[x], axes).shape);
  op.run([=](const Tensors &t) { copy(t[y], permute(t[x], axes)); });
}

void concat(Op &op, const Indices &in, const Indices &out, const Attributes &attributes) {
  Indices parts = in;
  const bool first = op[in[0]].on_host && in.size() > 1;  // concat_dim comes first, or is an attribute
  const int64_t axis = checked_axis(op, first ? constant(op, in[0]).at(0) : attribute_of(attributes, "concat_dim", 0),
                               op[out[0]].rank());
  if (first) parts.erase(parts.begin());
  op.run([=](const Tensors &t) {
    int64_t begin = 0;
    for (int part : parts) {
      copy(slice(t[out[0]], axis, begin, t[part].shape[axis]), t[part]);
      begin += t[part].shape[axis];
    }
  });
}

void move(Op &op, const Indices &in, const Indices &out, const Attributes &) {
  require_inputs(op, in, 1);
  op.require(op[in[0]].size() == op[out[0]].size(), "input and output differ in size");
  op.run([=](const Tensors &t) { copy(reshaped(t[out[0]], t[in[0]].shape), t[in[0]]); });
}

void fill_zeros(Op &op, const Indices &, const Indices &out, const Attributes &) {
  op.run([=](const Tensors &t) { write(t[out[0]], std::vector<float>(t[out[0]].size())); });
}

}  // namespace

OldTable old_moves() {
  const std::vector<DType> all{FLOAT32, FLOAT16, BFLOAT16, INT8,  UINT8, BOOL,
                               INT16,   UINT16,  INT32,    UINT32, INT64, UINT64};
  const std::vector<DType> updated{FLOAT32, FLOAT16, BFLOAT16, INT32, INT64};
  return {
      {"Cast", move},
      {"TensorMove", move},
      {"Identity", move},
      {"ConcatD", concat},
      {"Concat", concat},
      {"ConcatV2", concat},
      {"GatherNd", of({FLOAT32, FLOAT16, BFLOAT16, INT8, UINT8, BOOL, INT32, INT64}, gather_nd)},
      {"GatherV2", of(all, gather)},
      {"Pack", pack},
      {"ScatterUpdate", of(updated, scatter_update)},
      {"Split", of(all, split)},
      {"SplitD", of(all, split)},
      {"StridedSlice", of(all, strided_slice)},
      {"StridedSliceGrad", of({FLOAT32, FLOAT16, BFLOAT16, INT32}, strided_slice_gradient)},
      {"TensorScatterUpdate", scatter_nd(false)},
      {"TensorScatterAdd", scatter_nd(true)},
      {"Transpose", of(all, turn)},
      {"UnsortedSegmentSum", unsorted_segment_sum},
      {"ZerosLike", fill_zeros},
  };
}

}  // namespace sim
