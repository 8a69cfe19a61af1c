// The library's kernels that are not simulated: each refuses by its name, with the tensors it is called with.
#include "kernel.h"

namespace mindspore::internal {
namespace {
InternalOpPtr refuse(const InputsImmutableInfoList &inputs, const OutputsImmutableInfoList &outputs,
                     const std::string &name) {
  return sim::make_internal(inputs, outputs, name, [](sim::Op &op) { op.refuse("this kernel is not simulated"); });
}
}  // namespace

#define MISSING(name)                                                                                              \
  InternalOpPtr Create##name##Op(const InputsImmutableInfoList &inputs, const OutputsImmutableInfoList &outputs, \
                                 const std::string &op_name) {                                                    \
    return refuse(inputs, outputs, op_name);                                                                       \
  }
#define MISSING_WITH(name, Param)                                                                                  \
  InternalOpPtr Create##name##Op(const InputsImmutableInfoList &inputs, const OutputsImmutableInfoList &outputs, \
                                 const Param &, const std::string &op_name) {                                     \
    return refuse(inputs, outputs, op_name);                                                                       \
  }

MISSING(FastGeLU)
MISSING(QuantLinearSparse)
MISSING(QuantPerChannel)
MISSING_WITH(AddLayerNorm, NormParam)
MISSING_WITH(AddRmsNormDynamicQuant, NormParam)
MISSING_WITH(AddRmsNormQuant, NormParam)
MISSING_WITH(DynamicNTK, DynamicNTKParam)
MISSING_WITH(FusedAddTopkDiv, FusedAddTopkDivParam)
MISSING_WITH(GroupTopk, GroupTopkParam)
MISSING_WITH(GroupedMatmul, MatmulParam)
MISSING_WITH(KvScaleCache, KvScaleCacheParam)
MISSING_WITH(MLA, MLAParam)
MISSING_WITH(MlaPreprocess, MlaPreprocessParam)
MISSING_WITH(MultiWeightMatmul, MultiWeightMatmulParam)
MISSING_WITH(RmsNormQuant, NormParam)
MISSING_WITH(SwiGLUDynamicQuant, SwiGLUParam)
MISSING_WITH(TransData, TransDataParam)
MISSING_WITH(TransposeBatchMatmulTranspose, TransBMMTransParam)
}  // namespace mindspore::internal
