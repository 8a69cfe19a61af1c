// A kernel of MindSpore's internal library (libms_kernels_internal), which CANN does not have: what it computes is
// described as an aclnn operator's first call is (sim.h); this wraps the description in the wheel's class InternalOp.
//
// MindSpore asks for a kernel's tiling when shapes or sequence lengths change, keeps it under a key of its own and hands
// it back before each launch. So the plan lives in the tiling here too: a key that forgets something shows.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "internal.h"
#include "../sim.h"

namespace sim {

namespace ms = mindspore::internal;

class InternalKernel : public ms::InternalOp {
 public:
  InternalKernel(const ms::InputsImmutableInfoList &inputs, const ms::OutputsImmutableInfoList &outputs,
                 const std::string &name)
      : InternalOp(inputs, outputs, name) {}

  ms::InternalStatus Launch(const ms::InputsAddrList &inputs, const ms::OutputsAddrList &outputs,
                            const ms::WsAddrList &workspaces, void *stream, const std::string &full_name) override;
  ms::InternalStatus Tiling(ms::RawHostAddr host, ms::HostRunInfoPtr *info) override;
  size_t GetTilingSize() const override { return 64; }
  std::vector<size_t> GetWorkspaceSize() const override { return workspaces_; }
  std::string DumpTiling(ms::RawHostAddr) const override { return op_name_; }
  ms::ShapeInfoList InferShape(const ms::ShapeInfoList &inputs) const override { return outputs_shape_; }
  ms::OpType GetOpType() override { return ms::kOpTypeAICore; }

 protected:
  // Checks and a function, of op's tensors: the kernel's inputs by their places, then its outputs. An optional input
  // that is not given is an undefined tensor.
  virtual void describe(Op &op) const = 0;
  size_t inputs() const { return inputs_ii_.size(); }

  ms::InternalStatus TilingImpl(ms::RawHostAddr, ms::HostRunInfoPtr *) override { return ms::kInternalError; }
  ms::InternalStatus LaunchImpl(const ms::InputsAddrList &, const ms::OutputsAddrList &, const ms::WsAddrList &,
                                void *) override {
    return ms::kInternalError;
  }

 private:
  void add(Op &op, const std::string &what, const ms::ArgImmutableInfo &info, const ms::ShapeInfo &shape) const;
  ms::TilingInfoPtr tiling_;
  std::vector<size_t> workspaces_;  // of the last tiling: MindSpore asks for them after it

 public:
  void SetTilingInfo(const ms::TilingInfoPtr &tiling) override { tiling_ = tiling; }
};

DType type_of(ms::DataType type);  // UNDEFINED for none
void internal_error(const Error &error);  // raised in MindSpore

// A kernel without settings that change.
template <class Describe>
ms::InternalOpPtr make_internal(const ms::InputsImmutableInfoList &inputs, const ms::OutputsImmutableInfoList &outputs,
                                const std::string &name, Describe describe) {
  struct Kernel final : InternalKernel {
    Kernel(const ms::InputsImmutableInfoList &inputs, const ms::OutputsImmutableInfoList &outputs,
           const std::string &name, Describe describe)
        : InternalKernel(inputs, outputs, name), describe_(std::move(describe)) {}
    void describe(Op &op) const override { describe_(op); }
    Describe describe_;
  };
  return std::make_shared<Kernel>(inputs, outputs, name, std::move(describe));
}

}  // namespace sim
