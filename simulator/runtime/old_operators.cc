// The interface of old operators, which MindSpore still takes for some: descriptors, buffers and attributes, and one
// call for all operators by name. Their bodies are in operators/old_operators.cc.
#include <cstring>
#include <memory>

#include "runtime/handles.h"
#include "sim.h"

struct aclTensorDesc : sim::Tensor {
  std::string name;
  std::shared_ptr<char[]> constant;  // its values, where they are known on the host
};
struct aclDataBuffer {
  void *data;
  size_t bytes;
};
struct aclopAttr : sim::Attributes {};

using namespace sim;

namespace {
template <class T>
int set(aclopAttr *attributes, const char *name, const T *values, size_t size) {
  (*attributes)[name].numbers.assign(values, values + size);
  return OK;
}

Tensor with_buffer(const aclTensorDesc &description, const aclDataBuffer *buffer,
                   std::vector<std::shared_ptr<char[]>> &constants) {
  Tensor tensor = description;
  if (!tensor) return tensor;
  std::shared_ptr<char[]> values = description.constant;
  if (tensor.on_host && values == nullptr && buffer != nullptr && buffer->data != nullptr) {
    values.reset(new char[buffer->bytes]);
    memcpy(values.get(), buffer->data, buffer->bytes);
  }
  tensor.on_host = values != nullptr;
  tensor.data = values != nullptr ? values.get() : buffer == nullptr ? nullptr : buffer->data;
  if (values != nullptr) constants.push_back(values);
  return tensor;
}
}  // namespace

extern "C" {

aclTensorDesc *aclCreateTensorDesc(int32_t type, int rank, const int64_t *shape, int32_t format) {
  auto *description = new aclTensorDesc;
  static_cast<Tensor &>(*description) = make_tensor(DType(type), Shape(shape, shape + rank), nullptr);
  description->format = format;
  return description;
}
void aclDestroyTensorDesc(const aclTensorDesc *description) { delete description; }
int aclSetTensorShape(aclTensorDesc *description, int rank, const int64_t *shape) {
  description->storage.assign(shape, shape + rank);
  return OK;
}
int aclSetTensorFormat(aclTensorDesc *description, int32_t format) { return OK; }  // of the storage; all is ND here
void aclSetTensorDescName(aclTensorDesc *description, const char *name) { description->name = name; }
int aclSetTensorConst(aclTensorDesc *description, void *data, size_t bytes) {
  description->constant.reset(new char[bytes]);
  memcpy(description->constant.get(), data, bytes);
  return OK;
}
int aclSetTensorPlaceMent(aclTensorDesc *description, int32_t memory) {
  description->on_host = memory == 1 || memory == 2;  // ACL_MEMTYPE_HOST, …_HOST_COMPILE_INDEPENDENT
  return OK;
}
size_t aclGetTensorDescNumDims(const aclTensorDesc *description) { return description->shape.size(); }
int64_t aclGetTensorDescDim(const aclTensorDesc *description, size_t axis) { return description->shape.at(axis); }
int aclGetTensorDescDimV2(const aclTensorDesc *description, size_t axis, int64_t *size) {
  return guard([&] { *size = description->dim(axis); });
}
size_t aclGetTensorDescSize(const aclTensorDesc *description) { return description->size() * size_of(description->type); }
size_t aclDataTypeSize(int32_t type) {
  size_t size = 0;
  guard([&] { size = size_of(DType(type)); });
  return size;
}

aclDataBuffer *aclCreateDataBuffer(void *data, size_t bytes) { return new aclDataBuffer{data, bytes}; }
int aclDestroyDataBuffer(const aclDataBuffer *buffer) {
  delete buffer;
  return OK;
}
int aclUpdateDataBuffer(aclDataBuffer *buffer, void *data, size_t bytes) {
  *buffer = {data, bytes};
  return OK;
}
void *aclGetDataBufferAddr(const aclDataBuffer *buffer) { return buffer->data; }

aclopAttr *aclopCreateAttr() { return new aclopAttr; }
void aclopDestroyAttr(const aclopAttr *attributes) { delete attributes; }
int aclopSetAttrBool(aclopAttr *a, const char *name, uint8_t value) { return set(a, name, &value, 1); }
int aclopSetAttrInt(aclopAttr *a, const char *name, int64_t value) { return set(a, name, &value, 1); }
int aclopSetAttrFloat(aclopAttr *a, const char *name, float value) { return set(a, name, &value, 1); }
int aclopSetAttrDataType(aclopAttr *a, const char *name, int32_t value) { return set(a, name, &value, 1); }
int aclopSetAttrListBool(aclopAttr *a, const char *name, int size, const uint8_t *v) { return set(a, name, v, size); }
int aclopSetAttrListInt(aclopAttr *a, const char *name, int size, const int64_t *v) { return set(a, name, v, size); }
int aclopSetAttrListFloat(aclopAttr *a, const char *name, int size, const float *v) { return set(a, name, v, size); }
int aclopSetAttrListDataType(aclopAttr *a, const char *name, int size, const int32_t *v) { return set(a, name, v, size); }
int aclopSetAttrString(aclopAttr *a, const char *name, const char *value) {
  (*a)[name].string = value;
  return OK;
}
int aclopSetCompileFlag(int32_t flag) { return OK; }
int aclSetCompileopt(int32_t option, const char *value) { return OK; }
int aclopSetModelDir(const char *path) { return OK; }

int aclopCompileAndExecuteV2(const char *type, int input_count, aclTensorDesc *input_descriptions[],
                             aclDataBuffer *input_buffers[], int output_count, aclTensorDesc *output_descriptions[],
                             aclDataBuffer *output_buffers[], aclopAttr *attributes, int32_t engine, int32_t compile,
                             const char *path, void *stream) {
  return guard([&] {
    Op op(type);
    const Attributes given = attributes == nullptr ? Attributes() : *attributes;
    Tensors tensors;
    std::vector<std::shared_ptr<char[]>> constants;
    auto take = [&](int count, aclTensorDesc *descriptions[], aclDataBuffer *buffers[], const char *what) {
      std::vector<int> indices;
      for (int i = 0; i < count; ++i) {
        tensors.push_back(with_buffer(*descriptions[i], buffers[i], constants));
        indices.push_back(op.add(what + ("[" + std::to_string(i) + "]"), tensors.back()));
      }
      return indices;
    };
    std::vector<int> inputs = take(input_count, input_descriptions, input_buffers, "input");
    std::vector<int> outputs = take(output_count, output_descriptions, output_buffers, "output");
    op.results = outputs;
    for (const auto &[name, attribute] : given) {
      std::string values = attribute.string;
      for (double number : attribute.numbers) values += format(values.empty() ? "%g" : " %g", number);
      op.settings += (op.settings.empty() ? "" : ", ") + name + " " + values;
    }
    auto body = old_operators().find(type);
    if (body == old_operators().end()) op.refuse("there is no such old operator in the simulator");
    try {
      body->second(op, inputs, outputs, given);
    } catch (const std::exception &error) {
      std::string text = error.what();
      if (text.rfind(op.name, 0) == 0) throw;
      op.refuse(text);
    }
    op.work = [work = op.work, constants](const Tensors &t) { work(t); };
    launch(stream, op, tensors);
  });
}
int aclopCompileAndExecute(const char *type, int input_count, aclTensorDesc *input_descriptions[],
                           aclDataBuffer *input_buffers[], int output_count, aclTensorDesc *output_descriptions[],
                           aclDataBuffer *output_buffers[], aclopAttr *attributes, int32_t engine, int32_t compile,
                           const char *path, void *stream) {
  return aclopCompileAndExecuteV2(type, input_count, input_descriptions, input_buffers, output_count,
                                  output_descriptions, output_buffers, attributes, engine, compile, path, stream);
}

// The allocator that an operator would take its workspace from: not needed here, but must be there.
static int allocator_handle;
void *aclrtAllocatorCreateDesc() { return &allocator_handle; }
int aclrtAllocatorDestroyDesc(void *allocator) { return OK; }
int aclrtAllocatorSetObjToDesc(void *allocator, void *object) { return OK; }
int aclrtAllocatorSetAllocFuncToDesc(void *allocator, void *function) { return OK; }
int aclrtAllocatorSetFreeFuncToDesc(void *allocator, void *function) { return OK; }
int aclrtAllocatorSetAllocAdviseFuncToDesc(void *allocator, void *function) { return OK; }
int aclrtAllocatorSetGetAddrFromBlockFuncToDesc(void *allocator, void *function) { return OK; }
int aclrtAllocatorRegister(void *stream, void *allocator) { return OK; }
int aclrtAllocatorUnregister(void *stream) { return OK; }
}
