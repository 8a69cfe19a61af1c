// RotaryPositionEmbedding and its gradient. Sources: header aclnn_rotary_position_embedding.h, documentation and tiling
// of ops-transformer (the layouts that cos may have, the cases in BNSD that it refuses), ops_910b_cann81.json.
#include <algorithm>

#include "gemm.h"
#include "../sim.h"

namespace sim {
namespace {

enum Mode { HALF = 0, INTERLEAVED = 1 };
constexpr int64_t kLargestHead = 896, kCores = 48;  // vector cores of a 910B2

// In CANN's words BNSD: x (B, N, S, D) with cos (1, 1, S, D), both first axes broadcast.
bool is_bnsd(const Shape &x, const Shape &cos) { return x[0] != cos[0] && x[1] != cos[1] && cos[2] != 1; }

void check_rotation(const Op &op, int x, int cos, int sin, int64_t mode) {
  op.types(x, {FLOAT32, FLOAT16, BFLOAT16});
  for (int i : {cos, sin}) {
    op.types(i, {op[x].type});
    op.rank(i, 4, 4);
  }
  op.rank(x, 4, 4);
  const Shape &shape = op[x].shape, &table = op[cos].shape;
  op.shape(sin, table);
  const int64_t size = op[x].dim(-1), bytes = size_of(op[x].type);
  op.require(mode == HALF || mode == INTERLEAVED, "mode must be 0 (half) or 1 (interleaved), not %ld", mode);
  op.require(size % 2 == 0 && size <= kLargestHead, "the head size must be even and at most %ld, not %ld", kLargestHead,
             size);
  op.require(table[3] == size, "cos has %ld columns for heads of %ld", table[3], size);
  for (int i = 0; i < 3; ++i) {
    op.require(table[i] == 1 || table[i] == shape[i], "axis %d of cos must be 1 or %ld, not %ld", i, shape[i],
               table[i]);
  }
  if (mode == HALF && is_bnsd(shape, table)) {
    const bool aligned = size / 2 * bytes % 32 == 0;
    const int64_t copies = shape[0] * shape[1], length = shape[2];
    op.require(!aligned || copies <= 8 * length,
               "in BNSD, B·N = %ld must not be above 8·S = %ld: give x as BSND or SBND", copies, 8 * length);
    op.require(aligned || 2 * copies <= (length + kCores - 1) / kCores || size >= 80,
               "in BNSD, heads of %ld are not aligned to 32 bytes a half: give x as BSND or SBND", size);
  }
}

// Where the partner of element j is, and whether the first of the pair (which takes minus its partner) is at j.
int64_t partner(int64_t j, int64_t size, int64_t mode) {
  if (mode == INTERLEAVED) return j ^ 1;
  return j < size / 2 ? j + size / 2 : j - size / 2;
}

bool is_first(int64_t j, int64_t size, int64_t mode) { return mode == INTERLEAVED ? j % 2 == 0 : j < size / 2; }

}  // namespace
}  // namespace sim

using namespace sim;

SIM_OPERATOR(aclnnRotaryPositionEmbedding)
extern "C" int aclnnRotaryPositionEmbeddingGetWorkspaceSize(const aclTensor *x, const aclTensor *cos,
                                                            const aclTensor *sin, int64_t mode, aclTensor *out,
                                                            uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnRotaryPositionEmbedding", workspace, executor, [&](Op &op) {
    const int a = op.input("x", x), c = op.input("cos", cos), s = op.input("sin", sin), y = op.output("out", out);
    op.setting("mode", mode);
    check_rotation(op, a, c, s, mode);
    op.types(y, {op[a].type});
    op.shape(y, op[a].shape);
    op.run([=](const Tensors &t) {
      const auto values = read<float>(t[a]), cosine = read<float>(broadcast(t[c], t[a].shape)),
                 sine = read<float>(broadcast(t[s], t[a].shape));
      const int64_t size = t[a].dim(-1);
      std::vector<float> turned(values.size());
      in_parallel(values.size() / size, 4.0 * values.size(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * size; i < end * size; i += size) {
          for (int64_t j = 0; j < size; ++j) {
            const float other = values[i + partner(j, size, mode)];
            turned[i + j] = values[i + j] * cosine[i + j] + (is_first(j, size, mode) ? -other : other) * sine[i + j];
          }
        }
      });
      write(t[y], turned);
    });
  });
}

// x is only needed for the gradients of cos and sin, which may be left out.
SIM_OPERATOR(aclnnRotaryPositionEmbeddingGrad)
extern "C" int aclnnRotaryPositionEmbeddingGradGetWorkspaceSize(
    const aclTensor *gradient, const aclTensor *cos, const aclTensor *sin, const aclTensor *x, int64_t mode,
    const aclTensor *x_gradient, const aclTensor *cos_gradient, const aclTensor *sin_gradient, uint64_t *workspace,
    aclOpExecutor **executor) {
  return plan("aclnnRotaryPositionEmbeddingGrad", workspace, executor, [&](Op &op) {
    const int d = op.input("dy", gradient), c = op.input("cos", cos), s = op.input("sin", sin),
              a = op.optional("xOptional", x), dx = op.output("dxOut", x_gradient),
              dc = op.optional("dcosOut", cos_gradient), ds = op.optional("dsinOut", sin_gradient);
    op.setting("mode", mode);
    check_rotation(op, d, c, s, mode);
    for (int i : {a, dx}) op.types(i, {op[d].type}), op.shape(i, op[d].shape);
    for (int i : {dc, ds}) op.types(i, {op[d].type}), op.shape(i, op[c].shape);
    op.run([=](const Tensors &t) {
      const Shape &shape = t[d].shape;
      const auto dy = read<float>(t[d]), cosine = read<float>(broadcast(t[c], shape)),
                 sine = read<float>(broadcast(t[s], shape));
      const int64_t size = shape[3];
      std::vector<float> result(dy.size());
      for (int64_t i = 0; i < int64_t(dy.size()); ++i) {
        const int64_t j = i % size, other = i - j + partner(j, size, mode);
        const float product = dy[other] * sine[other];
        result[i] = dy[i] * cosine[i] + (is_first(j, size, mode) ? product : -product);
      }
      write(t[dx], result);
      if (!t[a] || !t[dc] || !t[ds]) return;
      const auto values = read<float>(t[a]);
      std::vector<int64_t> places(t[c].size());
      for (size_t i = 0; i < places.size(); ++i) places[i] = i;
      Tensor table = make_tensor(INT64, t[c].shape, places.data());
      const auto place = read<int64_t>(broadcast(table, shape));  // of each element in cos
      std::vector<float> cos_sum(places.size()), sin_sum(places.size());
      for (int64_t i = 0; i < int64_t(dy.size()); ++i) {
        const int64_t j = i % size;
        const float other = values[i - j + partner(j, size, mode)];
        cos_sum[place[i]] += dy[i] * values[i];
        sin_sum[place[i]] += dy[i] * (is_first(j, size, mode) ? -other : other);
      }
      write(t[dc], cos_sum);
      write(t[ds], sin_sum);
    });
  });
}
