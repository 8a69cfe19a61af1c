// Which dtypes the library has a kernel for; where it has none, MindSpore turns to aclnn. As the wheel's own library
// answers (tests/simulator asks both).
#include <algorithm>

#include "internal.h"

namespace mindspore::internal {
namespace {

bool one_of(DataType type, std::initializer_list<DataType> allowed) {
  return std::find(allowed.begin(), allowed.end(), type) != allowed.end();
}

bool is_half(DataType type) { return one_of(type, {kTypeFloat16, kTypeBF16}); }

// All of the types are the first; `none` where an optional tensor may be absent.
bool same(const InputDataTypes &types, std::initializer_list<size_t> places, bool none = false) {
  return std::all_of(places.begin(), places.end(), [&](size_t i) {
    return types.at(i) == types.at(0) || (none && types.at(i) == kTypeNone);
  });
}

}  // namespace

bool IsInternalKernelDtypesSupported(const std::string name, InputDataTypes in, InputDataTypes out) {
  if (name == kInternalMatMulOpName) return is_half(in.at(0)) && same(in, {1}) && out.at(0) == in[0];
  if (name == kInternalAddRmsNormOpName) {
    return (is_half(in.at(0)) || in[0] == kTypeFloat32) && same(in, {1}) && one_of(in.at(2), {in[0], kTypeFloat32}) &&
           out == InputDataTypes{in[0], kTypeFloat32, in[0]};
  }
  if (name == kInternalGatherOpName) {
    return (is_half(in.at(0)) || one_of(in[0], {kTypeFloat32, kTypeInt32})) && out.at(0) == in[0] &&
           one_of(in.at(1), {kTypeInt32, kTypeInt64});
  }
  if (name == kInternalReshapeAndCacheOpName) {
    return (is_half(in.at(0)) || one_of(in[0], {kTypeInt8, kTypeUint8})) && same(in, {1, 2, 3}, true) &&
           in.at(2) != kTypeNone && in.at(4) == kTypeInt32;
  }
  if (name == kInternalApplyRotaryPosEmbOpName) {
    return is_half(in.at(0)) && same(in, {1}) && one_of(in.at(2), {in[0], kTypeFloat32}) && in.at(3) == in[2] &&
           in.at(4) == kTypeInt32 && out == InputDataTypes{in[0], in[0]};
  }
  if (name == kInternalSoftmaxOpName) return one_of(in.at(0), {kTypeFloat16, kTypeFloat32}) && out.at(0) == in[0];
  if (name == kInternalSwiGLUOpName) return (is_half(in.at(0)) || in[0] == kTypeFloat32) && out.at(0) == in[0];
  if (name == kInternalSwishOpName) return is_half(in.at(0)) && out.at(0) == in[0];
  if (name == kInternalPagedAttentionOpName) {
    return is_half(in.at(0)) && same(in, {1}) && same(in, {2}, true) && in.at(3) == kTypeInt32 &&
           in.at(4) == kTypeInt32 && in.at(5) == kTypeNone && in.at(6) == kTypeNone && same(in, {7, 8}, true) &&
           out.at(0) == in[0];
  }
  if (name == kInternalFlashAttentionScoreOpName) {
    return is_half(in.at(0)) && same(in, {1, 2}) && same(in, {3}, true) && out.at(0) == in[0] &&
           (same(in, {4}, true) || in.at(4) == kTypeFloat16);
  }
  return true;  // not simulated: its Create function says so
}

}  // namespace mindspore::internal
