// The few classes of graph engine (namespace ge) that MindSpore's kernel-by-kernel mode uses: descriptions of old
// operators, made as static objects when the library is loaded and asked for names and attributes. Each class is, as in
// CANN's public headers, one shared pointer to what it holds (Operator has a virtual destructor before it).
// missing.py writes the rest: what names an operator's inputs and outputs does nothing, what only graph-engine mode needs
// refuses by name.
#include <any>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ge {

enum DataType : int { DT_FLOAT = 0 };
enum Format : int { FORMAT_ND = 2 };
enum Placement : int { PLACEMENT_HOST = 0 };
class Graph;

class AscendString {
 public:
  AscendString() = default;
  AscendString(const char *text);
  const char *GetString() const;
  bool operator<(const AscendString &other) const;

 private:
  std::shared_ptr<std::string> text;
};
AscendString::AscendString(const char *text) : text(text ? std::make_shared<std::string>(text) : nullptr) {}
const char *AscendString::GetString() const { return text ? text->c_str() : ""; }
bool AscendString::operator<(const AscendString &other) const { return std::string(GetString()) < other.GetString(); }

class TensorType {
 public:
  TensorType(const std::initializer_list<DataType> &types);

 private:
  std::shared_ptr<std::vector<DataType>> types;
};
TensorType::TensorType(const std::initializer_list<DataType> &) {}

class Promote {
 public:
  Promote(const std::initializer_list<const char *> &names);

 private:
  std::shared_ptr<void> nothing;
};
Promote::Promote(const std::initializer_list<const char *> &) {}

class Shape {
 public:
  Shape();
  explicit Shape(const std::vector<int64_t> &sizes);
  size_t GetDimNum() const;
  int64_t GetDim(size_t axis) const;
  int SetDim(size_t axis, int64_t size);
  std::vector<int64_t> GetDims() const;

 private:
  std::shared_ptr<std::vector<int64_t>> sizes;
};
Shape::Shape() : sizes(std::make_shared<std::vector<int64_t>>()) {}
Shape::Shape(const std::vector<int64_t> &sizes) : sizes(std::make_shared<std::vector<int64_t>>(sizes)) {}
size_t Shape::GetDimNum() const { return sizes->size(); }
int64_t Shape::GetDim(size_t axis) const { return axis < sizes->size() ? (*sizes)[axis] : 0; }
int Shape::SetDim(size_t axis, int64_t size) {
  if (axis < sizes->size()) (*sizes)[axis] = size;
  return 0;
}
std::vector<int64_t> Shape::GetDims() const { return *sizes; }

struct Description {
  Shape shape, origin_shape;
  Format format = FORMAT_ND, origin_format = FORMAT_ND;
  DataType type = DT_FLOAT;
};

class TensorDesc {
 public:
  TensorDesc();
  TensorDesc(Shape shape, Format format, DataType type);
  TensorDesc(const TensorDesc &other);
  TensorDesc(TensorDesc &&other);
  TensorDesc &operator=(const TensorDesc &other);
  TensorDesc &operator=(TensorDesc &&other);
  Shape GetShape() const;
  Shape GetOriginShape() const;
  Format GetFormat() const;
  DataType GetDataType() const;
  void SetShape(const Shape &shape);
  int SetOriginShape(const Shape &shape);
  void SetFormat(Format format);
  void SetOriginFormat(Format format);
  void SetDataType(DataType type);
  void SetPlacement(Placement placement);
  void SetRealDimCnt(int64_t count);

 private:
  std::shared_ptr<Description> held;
};
TensorDesc::TensorDesc() : held(std::make_shared<Description>()) {}
TensorDesc::TensorDesc(Shape shape, Format format, DataType type)
    : held(std::make_shared<Description>(Description{shape, shape, format, format, type})) {}
TensorDesc::TensorDesc(const TensorDesc &other) : held(std::make_shared<Description>(*other.held)) {}
TensorDesc::TensorDesc(TensorDesc &&other) : held(other.held) {}
TensorDesc &TensorDesc::operator=(const TensorDesc &other) {
  held = std::make_shared<Description>(*other.held);
  return *this;
}
TensorDesc &TensorDesc::operator=(TensorDesc &&other) {
  held = other.held;
  return *this;
}
Shape TensorDesc::GetShape() const { return held->shape; }
Shape TensorDesc::GetOriginShape() const { return held->origin_shape; }
Format TensorDesc::GetFormat() const { return held->format; }
DataType TensorDesc::GetDataType() const { return held->type; }
void TensorDesc::SetShape(const Shape &shape) { held->shape = shape; }
int TensorDesc::SetOriginShape(const Shape &shape) {
  held->origin_shape = shape;
  return 0;
}
void TensorDesc::SetFormat(Format format) { held->format = format; }
void TensorDesc::SetOriginFormat(Format format) { held->origin_format = format; }
void TensorDesc::SetDataType(DataType type) { held->type = type; }
void TensorDesc::SetPlacement(Placement) {}
void TensorDesc::SetRealDimCnt(int64_t) {}

struct Contents {
  TensorDesc description;
  std::vector<uint8_t> data;
};

class Tensor {
 public:
  Tensor();
  explicit Tensor(const TensorDesc &description);
  Tensor(const TensorDesc &description, const uint8_t *data, size_t size);
  TensorDesc GetTensorDesc() const;
  uint8_t *GetData();
  size_t GetSize() const;
  int SetData(const uint8_t *data, size_t size);
  int SetData(const std::string &text);

 private:
  std::shared_ptr<Contents> held;
};
Tensor::Tensor() : held(std::make_shared<Contents>()) {}
Tensor::Tensor(const TensorDesc &description) : held(std::make_shared<Contents>(Contents{description, {}})) {}
Tensor::Tensor(const TensorDesc &description, const uint8_t *data, size_t size)
    : held(std::make_shared<Contents>(Contents{description, {data, data + size}})) {}
TensorDesc Tensor::GetTensorDesc() const { return held->description; }
uint8_t *Tensor::GetData() { return held->data.data(); }
size_t Tensor::GetSize() const { return held->data.size(); }
int Tensor::SetData(const uint8_t *data, size_t size) {
  held->data.assign(data, data + size);
  return 0;
}
int Tensor::SetData(const std::string &text) { return SetData(reinterpret_cast<const uint8_t *>(text.data()), text.size()); }

struct Properties {
  std::string name, type;
  std::map<std::string, std::any> attributes;
};


class Operator {
 public:
  Operator() = default;
  explicit Operator(const char *type);
  explicit Operator(const std::string &type);
  Operator(const char *name, const char *type);
  Operator(const std::string &name, const std::string &type);
  Operator(const AscendString &name, const AscendString &type);
  virtual ~Operator() = default;

  std::string GetName() const;
  std::string GetOpType() const;
  int GetName(AscendString &name) const;
  int GetOpType(AscendString &type) const;

  template <class T>
  Operator &set(const std::string &name, const T &value) {
    if (held) held->attributes[name] = value;
    return *this;
  }
  template <class T>
  int get(const std::string &name, T &value) const {
    auto it = held ? held->attributes.find(name) : decltype(held->attributes.find(name)){};
    if (!held || it == held->attributes.end()) return 1;
    if (auto *same = std::any_cast<T>(&it->second)) value = *same;
    else if (!number(it->second, value)) return 1;
    return 0;
  }

#define MEMBERS(T)                                         \
  Operator &SetAttr(const char *name, const T &value);     \
  Operator &SetAttr(const std::string &name, const T &value); \
  int GetAttr(const char *name, T &value) const;           \
  int GetAttr(const std::string &name, T &value) const;    \
  void AttrRegister(const char *name, const T &value);
  MEMBERS(AscendString) MEMBERS(std::string) MEMBERS(DataType) MEMBERS(Tensor) MEMBERS(std::vector<bool>)
  MEMBERS(std::vector<int64_t>) MEMBERS(std::vector<int32_t>) MEMBERS(std::vector<float>)
  MEMBERS(std::vector<std::string>) MEMBERS(std::vector<AscendString>) MEMBERS(std::vector<DataType>)
  MEMBERS(std::vector<std::vector<int64_t>>)
#undef MEMBERS
#define MEMBERS(T)                                     \
  Operator &SetAttr(const char *name, T value);        \
  Operator &SetAttr(const std::string &name, T value); \
  int GetAttr(const char *name, T &value) const;       \
  int GetAttr(const std::string &name, T &value) const; \
  void AttrRegister(const char *name, T value);
  MEMBERS(bool) MEMBERS(int64_t) MEMBERS(int32_t) MEMBERS(uint32_t) MEMBERS(float)
#undef MEMBERS
  Operator &SetAttr(const char *name, const char *value);


 private:
  template <class T>
  static bool number(const std::any &from, T &to) {
    if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
      if (auto *wide = std::any_cast<int64_t>(&from)) return to = T(*wide), true;
      if (auto *narrow = std::any_cast<int32_t>(&from)) return to = T(*narrow), true;
    }
    return false;
  }
  std::shared_ptr<Properties> held;
};

Operator::Operator(const char *type) : held(std::make_shared<Properties>(Properties{type, type, {}})) {}
Operator::Operator(const std::string &type) : Operator(type.c_str()) {}
Operator::Operator(const char *name, const char *type) : held(std::make_shared<Properties>(Properties{name, type, {}})) {}
Operator::Operator(const std::string &name, const std::string &type) : Operator(name.c_str(), type.c_str()) {}
Operator::Operator(const AscendString &name, const AscendString &type) : Operator(name.GetString(), type.GetString()) {}
std::string Operator::GetName() const { return held ? held->name : ""; }
std::string Operator::GetOpType() const { return held ? held->type : ""; }
int Operator::GetName(AscendString &name) const {
  name = AscendString(GetName().c_str());
  return 0;
}
int Operator::GetOpType(AscendString &type) const {
  type = AscendString(GetOpType().c_str());
  return 0;
}

#define DEFINE(T)                                                                                     \
  Operator &Operator::SetAttr(const char *name, const T &value) { return set<T>(name, value); }        \
  Operator &Operator::SetAttr(const std::string &name, const T &value) { return set<T>(name, value); } \
  int Operator::GetAttr(const char *name, T &value) const { return get<T>(name, value); }              \
  int Operator::GetAttr(const std::string &name, T &value) const { return get<T>(name, value); }       \
  void Operator::AttrRegister(const char *name, const T &value) { set<T>(name, value); }
DEFINE(AscendString) DEFINE(std::string) DEFINE(DataType) DEFINE(Tensor) DEFINE(std::vector<bool>)
DEFINE(std::vector<int64_t>) DEFINE(std::vector<int32_t>) DEFINE(std::vector<float>) DEFINE(std::vector<std::string>)
DEFINE(std::vector<AscendString>) DEFINE(std::vector<DataType>) DEFINE(std::vector<std::vector<int64_t>>)
#undef DEFINE
#define DEFINE(T)                                                                             \
  Operator &Operator::SetAttr(const char *name, T value) { return set<T>(name, value); }       \
  Operator &Operator::SetAttr(const std::string &name, T value) { return set<T>(name, value); } \
  int Operator::GetAttr(const char *name, T &value) const { return get<T>(name, value); }      \
  int Operator::GetAttr(const std::string &name, T &value) const { return get<T>(name, value); } \
  void Operator::AttrRegister(const char *name, T value) { set<T>(name, value); }
DEFINE(bool) DEFINE(int64_t) DEFINE(int32_t) DEFINE(uint32_t) DEFINE(float)
#undef DEFINE
Operator &Operator::SetAttr(const char *name, const char *value) { return set<std::string>(name, value); }


class OperatorFactory {
 public:
  static Operator CreateOperator(const char *name, const char *type);
  static Operator CreateOperator(const std::string &name, const std::string &type);
  static bool IsExistOp(const char *type);
  static bool IsExistOp(const std::string &type);
};
Operator OperatorFactory::CreateOperator(const char *name, const char *type) { return Operator(name, type); }
Operator OperatorFactory::CreateOperator(const std::string &name, const std::string &type) { return Operator(name, type); }
bool OperatorFactory::IsExistOp(const char *) { return true; }
bool OperatorFactory::IsExistOp(const std::string &) { return true; }

class StatusFactory {
 public:
  static StatusFactory *Instance();

 private:
  std::map<uint32_t, std::string> descriptions;  // filled in by code inlined in the wheel
};
StatusFactory *StatusFactory::Instance() {
  static StatusFactory factory;
  return &factory;
}

uint32_t GEInitialize(const std::map<std::string, std::string> &) { return 0; }
uint32_t GEInitialize(const std::map<AscendString, AscendString> &) { return 0; }
uint32_t GEFinalize() { return 0; }

}  // namespace ge
