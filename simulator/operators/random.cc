// Random numbers by seed and offset, and dropout by bit masks.
// Sources: headers aclnn_{dropout_gen_mask,dropout_do_mask,uniform,normal}.h of CANN 8.1, documentation and host code
// of ops-math: the offset is the upper half of the generator's 128-bit counter, so that each has a sequence of its own.
// The generator here is Philox4x32-10 (Salmon et al., 2011); the card's bits need not be these.
#include <array>
#include <cmath>

#include "../sim.h"

namespace sim {
namespace {

std::array<uint32_t, 4> philox(uint64_t seed, uint64_t offset, uint64_t place) {
  std::array<uint32_t, 4> c{uint32_t(place), uint32_t(place >> 32), uint32_t(offset), uint32_t(offset >> 32)};
  uint32_t key0 = seed, key1 = seed >> 32;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    c = {uint32_t(b >> 32) ^ c[1] ^ key0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ key1, uint32_t(a)};
    key0 += 0x9E3779B9, key1 += 0xBB67AE85;
  }
  return c;
}

// count numbers in [0, 1).
std::vector<double> uniform(int64_t count, uint64_t seed, uint64_t offset) {
  std::vector<double> values(count);
  for (int64_t i = 0; i < count; i += 4) {
    const auto words = philox(seed, offset, i / 4);
    for (int64_t j = i; j < std::min(count, i + 4); ++j) values[j] = words[j - i] * 0x1p-32;
  }
  return values;
}

// Bytes of a mask of a bit for each of `elements`, which come in groups of 128.
int64_t mask_bytes(int64_t elements) { return (elements + 127) / 128 * 16; }

int fill_random(const char *name, const aclTensor *self, uint64_t seed, uint64_t offset, uint64_t *workspace,
                aclOpExecutor **executor, const std::function<void(std::vector<double> &)> &shape_values) {
  return plan(name, workspace, executor, [&](Op &op) {
    const int x = op.output("selfRef", self);
    op.setting("seed", int64_t(seed)), op.setting("offset", int64_t(offset));
    op.run([=](const Tensors &t) {
      auto values = uniform((t[x].size() + 1) / 2 * 2, seed, offset);
      shape_values(values);
      values.resize(t[x].size());
      write(t[x], values);
    });
  });
}

}  // namespace
}  // namespace sim

using namespace sim;

SIM_OPERATOR(aclnnDropoutGenMaskV2)
extern "C" int aclnnDropoutGenMaskV2GetWorkspaceSize(const aclIntArray *shape, double probability, int64_t seed,
                                                     int64_t offset, int type, aclTensor *out, uint64_t *workspace,
                                                     aclOpExecutor **executor) {
  return plan("aclnnDropoutGenMaskV2", workspace, executor, [&](Op &op) {
    const int y = op.output("out", out);
    const int64_t elements = product(op.setting("shape", shape));
    op.setting("prob", probability), op.setting("seed", seed), op.setting("offset", offset);
    op.types(y, {UINT8});
    op.require(probability >= 0 && probability <= 1, "prob must be in 0 to 1, not %g", probability);
    op.require(type == FLOAT32 || type == FLOAT16 || type == BFLOAT16,
               "probDataType must be float32, float16 or bfloat16");
    op.shape(y, {mask_bytes(elements)});
    op.run([=](const Tensors &t) {
      std::vector<int64_t> bytes(t[y].size());
      const double dropped = round_to(DType(type), probability);
      const auto numbers = uniform(bytes.size() * 8, seed, offset);
      for (size_t i = 0; i < numbers.size(); ++i) bytes[i / 8] |= int64_t{numbers[i] >= dropped} << (i % 8);
      write(t[y], bytes);
    });
  });
}

SIM_OPERATOR(aclnnDropoutDoMask)
extern "C" int aclnnDropoutDoMaskGetWorkspaceSize(const aclTensor *self, const aclTensor *mask, double probability,
                                                  aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnDropoutDoMask", workspace, executor, [&](Op &op) {
    const int x = op.input("self", self), m = op.input("mask", mask), y = op.output("out", out);
    op.setting("prob", probability);
    op.types(x, {FLOAT32, FLOAT16, BFLOAT16});
    op.types(m, {UINT8});
    op.require(probability >= 0 && probability <= 1, "prob must be in 0 to 1, not %g", probability);
    op.require(op[m].size() >= mask_bytes(op[x].size()), "mask has %ld bytes, %ld are needed", op[m].size(),
               mask_bytes(op[x].size()));
    op.shape(y, op[x].shape);
    op.run([=](const Tensors &t) {
      auto values = read<float>(t[x]);
      const auto bytes = read<int64_t>(t[m]);
      const float factor = probability == 1 ? 0 : 1 / (1 - probability);
      for (size_t i = 0; i < values.size(); ++i) values[i] *= bytes[i / 8] >> (i % 8) & 1 ? factor : 0;
      write(t[y], values);
    });
  });
}

SIM_OPERATOR(aclnnInplaceUniform)
extern "C" int aclnnInplaceUniformGetWorkspaceSize(const aclTensor *self, double low, double high, uint64_t seed,
                                                   uint64_t offset, uint64_t *workspace, aclOpExecutor **executor) {
  return fill_random("aclnnInplaceUniform", self, seed, offset, workspace, executor, [=](std::vector<double> &values) {
    for (auto &value : values) value = low + (high - low) * value;
  });
}

SIM_OPERATOR(aclnnInplaceNormal)
extern "C" int aclnnInplaceNormalGetWorkspaceSize(const aclTensor *self, float mean, float deviation, int64_t seed,
                                                  int64_t offset, uint64_t *workspace, aclOpExecutor **executor) {
  return fill_random("aclnnInplaceNormal", self, seed, offset, workspace, executor, [=](std::vector<double> &values) {
    for (size_t i = 0; i + 1 < values.size(); i += 2) {  // Box and Muller
      const double radius = std::sqrt(-2 * std::log(1 - values[i])), angle = 2 * M_PI * values[i + 1];
      values[i] = mean + deviation * radius * std::cos(angle);
      values[i + 1] = mean + deviation * radius * std::sin(angle);
    }
  });
}
