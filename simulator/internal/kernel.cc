#include "kernel.h"

#include <cstring>

namespace mindspore::internal {
namespace {
LogFuncPtr log_function = nullptr;
}

void SetLogFunction(LogFuncPtr function) { log_function = function; }

InternalOp::InternalOp(const InputsImmutableInfoList &inputs, const OutputsImmutableInfoList &outputs,
                       const std::string &name)
    : inputs_ii_(inputs), outputs_ii_(outputs), op_name_(name) {}

InternalStatus InternalOp::Init() { return InitImpl(); }
InternalStatus InternalOp::InitImpl() { return kInternalOk; }

InternalStatus InternalOp::UpdateShape(const ShapeInfoList &inputs, const ShapeInfoList &outputs) {
  inputs_shape_ = inputs;
  outputs_shape_ = outputs;
  return kInternalOk;
}

// What the simulator's kernels override, or never use.
void InternalOp::SetTilingInfo(const TilingInfoPtr &) {}
InternalStatus InternalOp::Launch(const InputsAddrList &, const OutputsAddrList &, const WsAddrList &, void *,
                                  const std::string &) {
  return kInternalError;
}
InternalStatus InternalOp::Tiling(RawHostAddr, HostRunInfoPtr *) { return kInternalError; }
InternalStatus InternalOp::TilingFromTuning(RawDeviceAddr) { return kInternalError; }
InternalStatus InternalOp::LaunchWithProfiling(const InputsAddrList &, const OutputsAddrList &, const WsAddrList &,
                                               void *, const std::string &) {
  return kInternalError;
}
bool InternalOp::IsSupported(const InputDataTypes &) { return true; }

HostRunInfoComm::HostRunInfoComm(uint32_t block_dim) : block_dim_(block_dim) {}
uint32_t HostRunInfoComm::GetBlockDim() const { return block_dim_; }
}  // namespace mindspore::internal

namespace sim {

void internal_error(const Error &error) {
  report(error);
  if (ms::log_function != nullptr) {
    ms::log_function(error.what(), __FILE__, __LINE__, "internal kernel", ms::LogLevel::EXCEPTION);
  }
}

DType type_of(ms::DataType type) {
  switch (type) {
    case ms::kTypeNone: return UNDEFINED;
    case ms::kTypeFloat16: return FLOAT16;
    case ms::kTypeFloat32: return FLOAT32;
    case ms::kTypeFloat64: return FLOAT64;
    case ms::kTypeBF16: return BFLOAT16;
    case ms::kTypeInt8: return INT8;
    case ms::kTypeInt16: return INT16;
    case ms::kTypeInt32: return INT32;
    case ms::kTypeInt64: return INT64;
    case ms::kTypeUint8: return UINT8;
    case ms::kTypeUint16: return UINT16;
    case ms::kTypeUint32: return UINT32;
    case ms::kTypeUint64: return UINT64;
    case ms::kTypeBool: return BOOL;
    default: fail("internal kernels: no data type %d", static_cast<int>(type));
  }
}

namespace {

struct Plan final : ms::HostRunInfoComm {
  explicit Plan(const std::string &name) : HostRunInfoComm(1), op("Internal" + name) {}
  Op op;
};

}  // namespace

void InternalKernel::add(Op &op, const std::string &what, const ms::ArgImmutableInfo &info,
                         const ms::ShapeInfo &shape) const {
  const DType type = type_of(info.GetDtype());
  op.add(what, type == UNDEFINED ? Tensor() : make_tensor(type, shape, nullptr));
  op.require(info.GetFormat() == ms::kFormatND, "%s has format %d: only ND is simulated", what.c_str(),
             static_cast<int>(info.GetFormat()));
}

ms::InternalStatus InternalKernel::Tiling(ms::RawHostAddr host, ms::HostRunInfoPtr *info) {
  try {
    auto plan = std::make_shared<Plan>(op_name_);
    for (size_t i = 0; i < inputs_ii_.size(); ++i) {
      add(plan->op, "input " + std::to_string(i), inputs_ii_[i], inputs_shape_.at(i));
    }
    for (size_t i = 0; i < outputs_ii_.size(); ++i) {
      add(plan->op, "output " + std::to_string(i), outputs_ii_[i], outputs_shape_.at(i));
      plan->op.results.push_back(plan->op.tensors.size() - 1);
    }
    describe(plan->op);
    workspaces_.assign(plan->op.workspace > 0 ? 1 : 0, plan->op.workspace);
    memset(host, 0, GetTilingSize());
    *info = plan;
    return ms::kInternalOk;
  } catch (const Error &error) {
    internal_error(error);
    return ms::kInternalError;
  }
}

ms::InternalStatus InternalKernel::Launch(const ms::InputsAddrList &inputs, const ms::OutputsAddrList &outputs,
                                          const ms::WsAddrList &, void *stream, const std::string &) {
  try {
    if (tiling_ == nullptr) fail("Internal%s: launched before its tiling was set", op_name_.c_str());
    const Op &op = static_cast<const Plan &>(*tiling_->host_run_info_).op;
    Tensors tensors = op.tensors;
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i]) tensors[i].data = i < inputs.size() ? inputs[i] : outputs.at(i - inputs.size());
    }
    launch(stream, op, tensors);
    return ms::kInternalOk;
  } catch (const Error &error) {
    internal_error(error);
    return ms::kInternalError;
  }
}

}  // namespace sim
