// Operators of the aclnn interface: planning a call, keeping the plan, launching it; and the handles they are given.
#include "runtime/log.h"
#include "runtime/stream.h"
#include "sim.h"

struct aclOpExecutor {
  sim::Op op;
  bool repeatable = false;
};

namespace sim {

int Op::add(const std::string &what, const Tensor &tensor, const aclTensor *handle) {
  tensors.push_back(tensor);
  if (!tensor.on_host) tensors.back().data = nullptr;
  handles.push_back(handle);
  names.push_back(what);
  return tensors.size() - 1;
}

int Op::optional(const char *what, const aclTensor *tensor) {
  return tensor == nullptr ? add(what, Tensor(), nullptr) : add(what, *tensor, tensor);
}

int Op::input(const char *what, const aclTensor *tensor) {
  int index = optional(what, tensor);
  if (tensor == nullptr) refuse(std::string(what) + " must be given");
  return index;
}

int Op::output(const char *what, const aclTensor *tensor) {
  results.push_back(input(what, tensor));
  return results.back();
}

std::vector<int> Op::inputs(const char *what, const aclTensorList *list) {
  if (list == nullptr) refuse(std::string(what) + " must be given");
  std::vector<int> indices;
  for (size_t i = 0; i < list->tensors.size(); ++i)
    indices.push_back(input((what + ("[" + std::to_string(i) + "]")).c_str(), list->tensors[i]));
  return indices;
}
std::vector<int> Op::outputs(const char *what, const aclTensorList *list) {
  std::vector<int> indices = inputs(what, list);
  results.insert(results.end(), indices.begin(), indices.end());
  return indices;
}

namespace {
void note(std::string &settings, const char *what, const std::string &value) {
  settings += (settings.empty() ? "" : ", ") + std::string(what) + " " + value;
}
}  // namespace

double Op::setting(const char *what, double value) {
  note(settings, what, format("%g", value));
  return value;
}
int64_t Op::setting(const char *what, int64_t value) {
  note(settings, what, std::to_string(value));
  return value;
}
bool Op::setting(const char *what, bool value) {
  note(settings, what, value ? "true" : "false");
  return value;
}
std::string Op::setting(const char *what, const char *value) {
  std::string given = value == nullptr ? "" : value;
  note(settings, what, "\"" + given + "\"");
  return given;
}
Shape Op::setting(const char *what, const aclIntArray *array) {
  Shape values = array == nullptr ? Shape() : array->values;
  note(settings, what, array == nullptr ? "null" : text(values));
  return values;
}
double Op::number(const char *what, const aclScalar *scalar) {
  if (scalar == nullptr) refuse(std::string(what) + " must be given");
  note(settings, what, format("%g", scalar->number));
  return scalar->number;
}

std::string Op::details() const {
  std::string s;
  for (size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i]) s += (s.empty() ? "" : ", ") + names[i] + " " + text(tensors[i]);
  return s + (settings.empty() || s.empty() ? "" : ", ") + settings;
}
std::string Op::call() const { return name + "(" + details() + ")"; }

void Op::refuse(const std::string &sentence) const { fail("%s: %s; called as %s", name.c_str(), sentence.c_str(), call().c_str()); }

void Op::require(bool condition, const char *sentence, ...) const {
  if (condition) return;
  char buffer[1024];
  va_list arguments;
  va_start(arguments, sentence);
  vsnprintf(buffer, sizeof(buffer), sentence, arguments);
  va_end(arguments);
  refuse(buffer);
}

void Op::types(int index, std::initializer_list<DType> allowed) const {
  const Tensor &t = tensors.at(index);
  if (!t) return;
  std::string list;
  for (DType type : allowed) {
    if (t.type == type) return;
    list += (list.empty() ? "" : ", ") + std::string(name_of(type));
  }
  refuse(names[index] + " is " + name_of(t.type) + ", must be one of " + list);
}

void Op::shape(int index, const Shape &expected) const {
  const Tensor &t = tensors.at(index);
  if (t && t.shape != expected) refuse(names[index] + " has shape " + text(t.shape) + ", must have " + text(expected));
}

void Op::rank(int index, int64_t low, int64_t high) const {
  const Tensor &t = tensors.at(index);
  if (t && (t.rank() < low || t.rank() > high))
    refuse(names[index] + format(" has %ld dimensions, must have %ld to %ld", long(t.rank()), long(low), long(high)));
}

Tensor resolve(const Tensor &tensor, const std::string &what) {
  if (!tensor || tensor.size() == 0 || tensor.on_host) return tensor;
  int64_t low = tensor.offset, high = tensor.offset;  // of the first and last element in memory
  for (int64_t i = 0; i < tensor.rank(); ++i) {
    int64_t reach = (tensor.shape[i] - 1) * tensor.strides[i];
    (reach < 0 ? low : high) += reach;
  }
  if (low < 0) fail("%s begins before its memory", what.c_str());
  const int64_t bits = bits_of(tensor.type), begin = low * bits / 8, end = ((high + 1) * bits + 7) / 8;
  Tensor resolved = tensor;
  resolved.data = static_cast<char *>(resolve(static_cast<char *>(tensor.data) + begin, end - begin, what)) - begin;
  return resolved;
}

namespace {
void launch_named(void *stream, const std::string &what, const std::string &details, const Tensors &tensors,
                  const std::vector<std::string> &names, std::function<void(const Tensors &)> work) {
  launch(stream, what, details, [=] {
    Tensors resolved;
    for (size_t i = 0; i < tensors.size(); ++i) {
      std::string place = what + " " + (names.empty() ? "tensor " + std::to_string(i) : names[i]);
      resolved.push_back(resolve(tensors[i], place));
    }
    try {
      work(resolved);
    } catch (const std::exception &error) {
      fail("%s(%s): %s", what.c_str(), details.c_str(), error.what());
    }
  });
}
}  // namespace

void launch(void *stream, const std::string &what, const Tensors &tensors, const std::string &settings,
            std::function<void(const Tensors &)> work) {
  std::string details;
  for (const Tensor &t : tensors)
    if (t) details += (details.empty() ? "" : ", ") + text(t);
  launch_named(stream, what, details + (settings.empty() ? "" : ", " + settings), tensors, {}, std::move(work));
}

namespace {
// Where operators do nothing, small results are ones all the same: a program may stop at other losses, norms or tokens.
void launch_nothing(void *stream, const Op &op, const Tensors &tensors) {
  constexpr int64_t SMALL = 16;  // elements: filling more takes time that is not the host's
  log::event("launch", stream == nullptr ? default_stream() : stream, op.name, 0, "");
  for (int index : op.results) {
    const Tensor &result = tensors[index];
    if (result && result.size() <= SMALL && result.size() > 0)
      enqueue(stream, {op.name, [result] { write(resolve(result, "result"), std::vector<float>(result.size(), 1)); }});
  }
}
}  // namespace

void launch(void *stream, const Op &op, const Tensors &tensors) {
  if (!op.work) fail("%s was planned without work", op.name.c_str());
  if (does_nothing(op.name)) return launch_nothing(stream, op, tensors);
  launch_named(stream, op.name, op.details(), tensors, op.names, op.work);
}

int plan(const char *name, uint64_t *workspace, aclOpExecutor **executor, const std::function<void(Op &)> &describe) {
  return guard([&] {
    Op op(name);
    try {
      describe(op);
    } catch (const std::exception &error) {  // of helpers, that do not know the operator
      std::string text = error.what();
      if (text.rfind(op.name, 0) == 0) throw;
      op.refuse(text);
    }
    *workspace = op.workspace;
    *executor = new aclOpExecutor{std::move(op)};
  });
}

int execute(const char *name, aclOpExecutor *executor, void *stream) {
  return guard([&] {
    const Op &op = executor->op;
    if (op.name != name) fail("%s was given the plan of %s", name, op.call().c_str());
    Tensors tensors = op.tensors;
    for (size_t i = 0; i < tensors.size(); ++i)
      if (op.handles[i] != nullptr) tensors[i].data = op.handles[i]->data;
    launch(stream, op, tensors);
    if (!executor->repeatable) delete executor;
  });
}
}  // namespace sim

using namespace sim;
extern "C" {

int aclSetAclOpExecutorRepeatable(aclOpExecutor *executor) {
  executor->repeatable = true;
  return OK;
}
int aclDestroyAclOpExecutor(aclOpExecutor *executor) {
  delete executor;
  return OK;
}
int aclSetTensorAddr(aclOpExecutor *executor, size_t index, aclTensor *tensor, void *address) {
  tensor->data = address;
  return OK;
}
int aclSetDynamicTensorAddr(aclOpExecutor *executor, size_t index, size_t in_list, aclTensorList *list, void *address) {
  return guard([&] { list->tensors.at(in_list)->data = address; });
}

int aclnnInit(const char *config) { return OK; }
int aclnnFinalize() { return OK; }
// A cache of the host's memory that a thread may keep between operators: there is none.
int InitHugeMemThreadLocal(void *, bool) { return OK; }
void UnInitHugeMemThreadLocal(void *, bool) {}
void ReleaseHugeMem(void *, bool) {}
}
