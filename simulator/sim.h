// What the parts of the simulator share: tensors as operators see them, errors, and how an operator is written.
//
// An operator of CANN's aclnn interface has two calls. The first looks at shapes and dtypes, on the host; the second
// puts the work into a stream. Here the first makes a plan (checks, and a function of the tensors), the second launches
// it:
//
//   SIM_OPERATOR(aclnnAdd)  // the second call
//   extern "C" int aclnnAddGetWorkspaceSize(const aclTensor *self, const aclTensor *other, const aclScalar *alpha,
//                                           aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
//     return sim::plan("aclnnAdd", workspace, executor, [&](sim::Op &op) {
//       int a = op.input("self", self), b = op.input("other", other), c = op.output("out", out);
//       op.require(op[a].type == op[b].type, "self and other differ in dtype");
//       double factor = op.number("alpha", alpha);
//       op.run([=](const sim::Tensors &t) {
//         auto x = sim::read<float>(sim::broadcast(t[a], t[c].shape)), y = ...;
//         for (size_t i = 0; i < x.size(); ++i) x[i] += factor * y[i];
//         sim::write(t[c], x);
//       });
//     });
//   }
//
// While planning, op[i] has shapes and dtypes and no data. MindSpore keeps a plan and launches it again with other
// addresses, so the function gets its tensors as they are at the launch, by the same numbers.
#pragma once
#include <cstdarg>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtypes.h"

namespace sim {

using Shape = std::vector<int64_t>;

struct Tensor {
  DType type = UNDEFINED;
  Shape shape, strides;  // strides and offset count elements; a stride may be 0 (broadcast)
  int64_t offset = 0;
  Shape storage;         // the shape of the memory that this is a view of
  int32_t format = 2;    // aclFormat; ND
  void *data = nullptr;  // in a plan: the device's address. In run(): where the operator may read and write
  bool on_host = false;  // its values are known while planning (constant inputs of old operators)

  int64_t rank() const { return shape.size(); }
  int64_t size() const;                // elements
  int64_t dim(int64_t axis) const;     // negative counts from the end
  bool contiguous() const;
  explicit operator bool() const { return type != UNDEFINED; }  // false for an optional tensor not given
  template <class T>
  T *at() const { return static_cast<T *>(data) + offset; }     // first element; only for its own C++ type
};
using Tensors = std::vector<Tensor>;

int64_t product(const Shape &shape);
Shape row_major(const Shape &shape);  // its strides
std::string text(const Shape &shape);
std::string text(const Tensor &tensor);  // "float32 (2,3)", with strides where they are not row-major
Tensor make_tensor(DType type, const Shape &shape, void *data);  // row-major

// Views: no data is moved.
Tensor broadcast(const Tensor &tensor, const Shape &shape);  // fails if it does not fit
Tensor transpose(const Tensor &tensor, int64_t axis, int64_t other);
Tensor permute(const Tensor &tensor, const Shape &axes);
Tensor slice(const Tensor &tensor, int64_t axis, int64_t begin, int64_t length, int64_t step = 1);
Shape broadcast_shapes(const Shape &a, const Shape &b);      // fails if they do not fit

// Elements in row-major order of the view. T is float, double or int64_t; write rounds to the tensor's dtype.
template <class T> std::vector<T> read(const Tensor &tensor);
template <class T> void write(const Tensor &tensor, const std::vector<T> &values);
void copy(const Tensor &to, const Tensor &from);  // same shape; converts dtypes as Cast does
double round_to(DType type, double value);        // the nearest number that the dtype has

// ---- errors: thrown by whoever notices, turned into ACL's status and aclGetRecentErrMsg's text at the C boundary
struct Error : std::runtime_error {
  int status;
  Error(int status, const std::string &message) : std::runtime_error(message), status(status) {}
};
enum Status { OK = 0, INVALID = 161002 /* ACLNN_ERR_PARAM_INVALID */, MEMORY_FULL = 207001, DEVICE_FAULT = 507015 };
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char *format, ...);
std::string format(const char *format, ...) __attribute__((format(printf, 1, 2)));
int report(const Error &error);  // keeps its text for aclGetRecentErrMsg, logs it, gives its status
template <class Function>
int guard(Function &&function) {  // body of an extern "C" function that returns a status
  try {
    function();
    return OK;
  } catch (const Error &error) {
    return report(error);
  }
}

// ---- memory: device addresses are not readable by the host
// Where this process may read or write the `bytes` at a device address; fails if they are not in live device memory.
void *resolve(const void *device_address, size_t bytes, const std::string &what);
// The tensor with data resolved over the span of its view.
Tensor resolve(const Tensor &tensor, const std::string &what);

// ---- streams
// Queues work; it runs later in the stream's own thread. A failure in it stops the stream: MindSpore hears of it at the
// next synchronisation. `what` is the operator's name in errors and in the log, `details` dtypes, shapes and settings.
void launch(void *stream, const std::string &what, const std::string &details, std::function<void()> work);
// The same for work on tensors given by device address: they are resolved in the stream, when the work's turn comes.
void launch(void *stream, const std::string &what, const Tensors &tensors, const std::string &settings,
            std::function<void(const Tensors &)> work);

class Op;
}  // namespace sim

// ---- the opaque types of aclnn's prototypes
struct aclTensor : sim::Tensor {};
struct aclScalar { sim::DType type; double number; int64_t integer; };
struct aclIntArray { std::vector<int64_t> values; };
struct aclFloatArray { std::vector<float> values; };
struct aclBoolArray { std::vector<bool> values; };
struct aclTensorList { std::vector<aclTensor *> tensors; };
struct aclScalarList { std::vector<const aclScalar *> scalars; };
struct aclOpExecutor;

namespace sim {

// What an operator's first call says of it. Every tensor and setting given to it is named in errors and in the log.
class Op {
 public:
  explicit Op(std::string name) : name(std::move(name)) {}
  // Tensors: a number to find them by; input and output fail on a null, optional takes it.
  int input(const char *what, const aclTensor *tensor);
  int optional(const char *what, const aclTensor *tensor);
  int output(const char *what, const aclTensor *tensor);
  std::vector<int> inputs(const char *what, const aclTensorList *list);
  std::vector<int> outputs(const char *what, const aclTensorList *list);
  int add(const std::string &what, const Tensor &tensor, const aclTensor *handle = nullptr);
  const Tensor &operator[](int index) const { return tensors.at(index); }

  // Settings: give back what they are given.
  double number(const char *what, const aclScalar *scalar);
  double setting(const char *what, double value);
  int64_t setting(const char *what, int64_t value);
  bool setting(const char *what, bool value);
  std::string setting(const char *what, const char *value);
  Shape setting(const char *what, const aclIntArray *array);  // a null is empty

  // Checks: an error says the operator, the sentence and everything it was called with.
  void require(bool condition, const char *sentence, ...) const __attribute__((format(printf, 3, 4)));
  [[noreturn]] void refuse(const std::string &sentence) const;
  void types(int index, std::initializer_list<DType> allowed) const;  // an absent optional passes
  void shape(int index, const Shape &expected) const;                 // likewise
  void rank(int index, int64_t low, int64_t high) const;

  void run(std::function<void(const Tensors &)> work) { this->work = std::move(work); }
  uint64_t workspace = 0;  // bytes that the card would ask for

  std::string call() const;  // "aclnnAdd(self float32 (2,3), …, alpha 1)"
  std::string details() const;
  std::string name;
  Tensors tensors;
  std::vector<const aclTensor *> handles;  // by tensor: where the address of the next launch stands; null if fixed
  std::vector<std::string> names;
  std::vector<int> results;  // which tensors are outputs
  std::string settings;
  std::function<void(const Tensors &)> work;
};

void launch(void *stream, const Op &op, const Tensors &tensors);  // a plan, with tensors by device address
int plan(const char *name, uint64_t *workspace, aclOpExecutor **executor, const std::function<void(Op &)> &describe);
int execute(const char *name, aclOpExecutor *executor, void *stream);

#define SIM_OPERATOR(name)                                                                             \
  extern "C" int name(void *workspace, uint64_t size, struct aclOpExecutor *executor, void *stream) { \
    return sim::execute(#name, executor, stream);                                                      \
  }

// ---- old operators (aclopCompileAndExecuteV2): a body plans as above, from numbered inputs and outputs and named
// attributes. Constant inputs (an axis, a begin) are on_host: read<int64_t>(op[i]) while planning.
struct Attribute {
  std::vector<double> numbers;       // of a bool, int, float, and of lists of them
  std::string string;
  double number() const { return numbers.at(0); }
};
using Attributes = std::map<std::string, Attribute>;
using OldOperator = std::function<void(Op &op, const std::vector<int> &inputs, const std::vector<int> &outputs,
                                       const Attributes &attributes)>;
const std::map<std::string, OldOperator> &old_operators();  // operators/old_operators.cc: the table

}  // namespace sim
