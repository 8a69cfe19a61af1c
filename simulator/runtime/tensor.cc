// Tensors as views of memory: shapes, strides, and reading and writing their elements.
#include <algorithm>
#include <numeric>

#include "sim.h"

namespace sim {

namespace {
struct TypeName { DType type; const char *name; size_t size; };
constexpr TypeName TYPES[] = {
    {FLOAT32, "float32", 4}, {FLOAT16, "float16", 2}, {BFLOAT16, "bfloat16", 2}, {FLOAT64, "float64", 8},
    {INT8, "int8", 1}, {UINT8, "uint8", 1}, {BOOL, "bool", 1}, {INT16, "int16", 2}, {UINT16, "uint16", 2},
    {INT32, "int32", 4}, {UINT32, "uint32", 4}, {INT64, "int64", 8}, {UINT64, "uint64", 8}, {STRING, "string", 0},
    {COMPLEX64, "complex64", 8}, {COMPLEX128, "complex128", 16}, {INT4, "int4", 0}, {UNDEFINED, "nothing", 0}};
}  // namespace

const char *name_of(DType type) {
  for (const TypeName &t : TYPES)
    if (t.type == type) return t.name;
  return "an unknown dtype";
}

size_t size_of(DType type) {
  for (const TypeName &t : TYPES)
    if (t.type == type && t.size > 0) return t.size;
  fail("%s (aclDataType %d) has no elements of a whole number of bytes", name_of(type), int(type));
}

int64_t bits_of(DType type) { return type == INT4 ? 4 : 8 * size_of(type); }

int64_t product(const Shape &shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<int64_t>());
}

Shape row_major(const Shape &shape) {
  Shape strides(shape.size());
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0; step *= shape[i]) strides[i] = step;
  return strides;
}

std::string text(const Shape &shape) {
  std::string s = "(";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? "," : "") + std::to_string(shape[i]);
  return s + ")";
}

std::string text(const Tensor &t) {
  if (!t) return "not given";
  std::string s = std::string(name_of(t.type)) + " " + text(t.shape);
  if (!t.contiguous()) s += " strides " + text(t.strides);
  if (t.offset != 0) s += " offset " + std::to_string(t.offset);
  if (t.format != 2 && t.format != 0) s += " format " + std::to_string(t.format);
  return s;
}

Tensor make_tensor(DType type, const Shape &shape, void *data) {
  Tensor t;
  t.type = type;
  t.shape = t.storage = shape;
  t.strides = row_major(shape);
  t.data = data;
  return t;
}

int64_t Tensor::size() const { return product(shape); }

int64_t Tensor::dim(int64_t axis) const {
  if (axis < 0) axis += rank();
  if (axis < 0 || axis >= rank()) fail("a tensor of shape %s has no axis %ld", text(shape).c_str(), long(axis));
  return shape[axis];
}

bool Tensor::contiguous() const {
  int64_t step = 1;
  for (int64_t i = rank(); i-- > 0; step *= shape[i])
    if (shape[i] != 1 && strides[i] != step) return false;
  return true;
}

Tensor broadcast(const Tensor &t, const Shape &shape) {
  Tensor view = t;
  size_t added = shape.size() - t.shape.size();
  if (t.shape.size() > shape.size()) fail("%s cannot be broadcast to %s", text(t.shape).c_str(), text(shape).c_str());
  view.shape = shape;
  view.strides.assign(shape.size(), 0);
  for (size_t i = 0; i < t.shape.size(); ++i) {
    if (t.shape[i] == shape[added + i]) view.strides[added + i] = t.strides[i];
    else if (t.shape[i] != 1) fail("%s cannot be broadcast to %s", text(t.shape).c_str(), text(shape).c_str());
  }
  return view;
}

Shape broadcast_shapes(const Shape &a, const Shape &b) {
  Shape shape(std::max(a.size(), b.size()), 1);
  for (size_t i = 0; i < shape.size(); ++i) {
    int64_t x = i < a.size() ? a[a.size() - 1 - i] : 1, y = i < b.size() ? b[b.size() - 1 - i] : 1;
    if (x != y && x != 1 && y != 1) fail("%s and %s cannot be broadcast to each other", text(a).c_str(), text(b).c_str());
    shape[shape.size() - 1 - i] = x == 1 ? y : x;
  }
  return shape;
}

Tensor transpose(const Tensor &t, int64_t axis, int64_t other) {
  Tensor view = t;
  if (axis < 0) axis += t.rank();
  if (other < 0) other += t.rank();
  std::swap(view.shape.at(axis), view.shape.at(other));
  std::swap(view.strides.at(axis), view.strides.at(other));
  return view;
}

Tensor permute(const Tensor &t, const Shape &axes) {
  Tensor view = t;
  if (int64_t(axes.size()) != t.rank()) fail("axes %s do not fit shape %s", text(axes).c_str(), text(t.shape).c_str());
  for (size_t i = 0; i < axes.size(); ++i) {
    int64_t axis = axes[i] < 0 ? axes[i] + t.rank() : axes[i];
    view.shape[i] = t.shape.at(axis);
    view.strides[i] = t.strides.at(axis);
  }
  return view;
}

Tensor slice(const Tensor &t, int64_t axis, int64_t begin, int64_t length, int64_t step) {
  Tensor view = t;
  if (axis < 0) axis += t.rank();
  int64_t last = begin + (length - 1) * step;
  if (length > 0 && (begin < 0 || begin >= t.dim(axis) || last < 0 || last >= t.dim(axis)))
    fail("a slice of %ld from %ld by %ld leaves axis %ld of %s", long(length), long(begin), long(step), long(axis),
         text(t.shape).c_str());
  view.offset += begin * t.strides[axis];
  view.shape[axis] = length;
  view.strides[axis] *= step;
  return view;
}

namespace {
// Calls row(offset of its first element, index of its first element) for each run along the last axis.
template <class Function>
void for_each_row(const Tensor &t, Function &&row) {
  int64_t length = t.rank() ? t.shape.back() : 1, rows = length ? t.size() / length : 0;
  Shape index(t.rank(), 0);
  int64_t offset = t.offset;
  for (int64_t r = 0; r < rows; ++r) {
    row(offset, r * length);
    for (int64_t axis = t.rank() - 2; axis >= 0; --axis) {
      offset += t.strides[axis];
      if (++index[axis] < t.shape[axis]) break;
      offset -= index[axis] * t.strides[axis];
      index[axis] = 0;
    }
  }
}
int64_t row_step(const Tensor &t) { return t.rank() ? t.strides.back() : 1; }
int64_t row_length(const Tensor &t) { return t.rank() ? t.shape.back() : 1; }

template <class T, class Value>
T convert(Value value) {
  if constexpr (std::is_same_v<T, bool>) return value != Value(0);
  else if constexpr (std::is_integral_v<T> && std::is_floating_point_v<Value>) return T(int64_t(value));
  else if constexpr (std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>) return T(float(value));
  else return T(value);
}
// float or double is what a small float's value goes through
template <class Value, class T>
Value value_of(T element) {
  if constexpr (std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>) return Value(float(element));
  else return Value(element);
}
}  // namespace

template <class V>
std::vector<V> read(const Tensor &t) {
  std::vector<V> values(t.size());
  const int64_t step = row_step(t), length = row_length(t);
  with_type(t.type, t.data, [&](auto *data) {
    for_each_row(t, [&](int64_t offset, int64_t index) {
      for (int64_t i = 0; i < length; ++i) values[index + i] = value_of<V>(data[offset + i * step]);
    });
  });
  return values;
}

template <class V>
void write(const Tensor &t, const std::vector<V> &values) {
  if (int64_t(values.size()) != t.size()) fail("%zu values for a tensor %s", values.size(), text(t).c_str());
  const int64_t step = row_step(t), length = row_length(t);
  with_type(t.type, t.data, [&](auto *data) {
    using T = std::decay_t<decltype(*data)>;
    for_each_row(t, [&](int64_t offset, int64_t index) {
      for (int64_t i = 0; i < length; ++i) data[offset + i * step] = convert<T>(values[index + i]);
    });
  });
}

template std::vector<float> read<float>(const Tensor &);
template std::vector<double> read<double>(const Tensor &);
template std::vector<int64_t> read<int64_t>(const Tensor &);
template void write<float>(const Tensor &, const std::vector<float> &);
template void write<double>(const Tensor &, const std::vector<double> &);
template void write<int64_t>(const Tensor &, const std::vector<int64_t> &);

void copy(const Tensor &to, const Tensor &from) {
  if (to.shape != from.shape) fail("a copy of shape %s to %s", text(from.shape).c_str(), text(to.shape).c_str());
  if (to.type == from.type && to.contiguous() && from.contiguous()) {
    size_t size = size_of(to.type);
    memmove(static_cast<char *>(to.data) + to.offset * size, static_cast<char *>(from.data) + from.offset * size,
            to.size() * size);
  } else if (to.type == FLOAT64 || from.type == FLOAT64) {
    write(to, read<double>(from));
  } else if (is_float(from.type)) {
    write(to, read<float>(from));
  } else {
    write(to, read<int64_t>(from));
  }
}

double round_to(DType type, double value) {
  double rounded = 0, buffer = 0;
  with_type(type, &buffer, [&](auto *p) {
    using T = std::decay_t<decltype(*p)>;
    rounded = value_of<double>(convert<T>(value));
  });
  return rounded;
}

}  // namespace sim
