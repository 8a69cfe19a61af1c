// The handles that operators of the aclnn interface are given: tensors, scalars, arrays and lists.
#include "runtime/handles.h"

#include <mutex>
#include <unordered_set>

namespace sim {
namespace {
struct Live {  // handles that have not been destroyed
  std::mutex lock;
  std::unordered_set<const void *> tensors, lists;
};
Live &live() {
  static auto &all = *new Live;
  return all;
}
}  // namespace

std::string describe_handle(const void *pointer) {
  std::lock_guard hold(live().lock);
  if (live().tensors.count(pointer)) {
    const auto &tensor = *static_cast<const aclTensor *>(pointer);
    return text(tensor) + (tensor.contiguous() ? " strides " + text(tensor.strides) : "");
  }
  std::string list;
  if (live().lists.count(pointer))
    for (const aclTensor *tensor : static_cast<const aclTensorList *>(pointer)->tensors)
      list += (list.empty() ? "[" : ", ") + text(*tensor);
  return list.empty() ? list : list + "]";
}
}  // namespace sim

using namespace sim;
extern "C" {

aclTensor *aclCreateTensor(const int64_t *shape, uint64_t rank, int32_t type, const int64_t *strides, int64_t offset,
                           int32_t format, const int64_t *storage, uint64_t storage_rank, void *data) {
  auto *tensor = new aclTensor;
  tensor->type = DType(type);
  tensor->shape.assign(shape, shape + rank);
  tensor->strides = strides == nullptr ? row_major(tensor->shape) : Shape(strides, strides + rank);
  tensor->offset = offset;
  tensor->format = format;
  tensor->storage.assign(storage, storage + storage_rank);
  tensor->data = data;
  std::lock_guard hold(live().lock);
  live().tensors.insert(tensor);
  return tensor;
}
int aclDestroyTensor(const aclTensor *tensor) {
  {
    std::lock_guard hold(live().lock);
    live().tensors.erase(tensor);
  }
  delete tensor;
  return OK;
}

aclScalar *aclCreateScalar(void *value, int32_t type) {
  auto *scalar = new aclScalar{DType(type), 0, 0};
  with_type(scalar->type, value, [&](auto *p) {
    if constexpr (sizeof(*p) == 2 && !std::is_integral_v<std::decay_t<decltype(*p)>>) {
      scalar->number = float(*p);
      scalar->integer = int64_t(float(*p));
    } else {
      scalar->number = double(*p);
      scalar->integer = int64_t(*p);
    }
  });
  return scalar;
}
int aclDestroyScalar(const aclScalar *scalar) {
  delete scalar;
  return OK;
}

aclIntArray *aclCreateIntArray(const int64_t *values, uint64_t size) { return new aclIntArray{{values, values + size}}; }
aclFloatArray *aclCreateFloatArray(const float *values, uint64_t size) { return new aclFloatArray{{values, values + size}}; }
aclBoolArray *aclCreateBoolArray(const bool *values, uint64_t size) { return new aclBoolArray{std::vector<bool>(values, values + size)}; }
int aclDestroyIntArray(const aclIntArray *array) {
  delete array;
  return OK;
}
int aclDestroyFloatArray(const aclFloatArray *array) {
  delete array;
  return OK;
}
int aclDestroyBoolArray(const aclBoolArray *array) {
  delete array;
  return OK;
}

aclTensorList *aclCreateTensorList(aclTensor *const *tensors, uint64_t size) {
  auto *list = new aclTensorList{{tensors, tensors + size}};
  std::lock_guard hold(live().lock);
  live().lists.insert(list);
  return list;
}
int aclDestroyTensorList(const aclTensorList *list) {  // and its tensors
  {
    std::lock_guard hold(live().lock);
    live().lists.erase(list);
  }
  for (aclTensor *tensor : list->tensors) aclDestroyTensor(tensor);
  delete list;
  return OK;
}

int aclGetViewShape(const aclTensor *tensor, int64_t **shape, uint64_t *rank) {  // the caller deletes it
  *rank = tensor->shape.size();
  *shape = new int64_t[*rank];
  std::copy(tensor->shape.begin(), tensor->shape.end(), *shape);
  return OK;
}
}
