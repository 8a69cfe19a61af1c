// ApplyRotaryPosEmb.
#include "kernel.h"

namespace sim {
namespace {

// Rotates each head of query and key, (tokens, heads · D) in 2 dimensions or with the batch apart in 3 and 4, by cos and
// sin of D numbers a token: out = x · cos + rotate_half(x) · sin, rotate_half(x1, x2) = (-x2, x1). Cosine formats 0 and
// 1 take tables of all positions and look up the lengths, 1 and 3 have pairs side by side; only 2 is simulated.
void rotate(Op &op, int32_t cos_format) {
  op.names = {"query", "key", "cos", "sin", "batch_valid_length", "query_embed", "key_embed"};
  op.setting("cos_format", int64_t{cos_format});
  op.require(cos_format == 2, "only cosine format 2 is simulated");
  op.types(0, {FLOAT16, BFLOAT16});
  op.require(op[1].type == op[0].type, "query and key differ in dtype");
  op.require(op[2].type == op[3].type && (op[2].type == op[0].type || op[2].type == FLOAT32),
             "cos and sin must both be float32 or of query's dtype");
  op.types(4, {INT32});
  op.rank(0, 2, 4);
  op.rank(2, 2, 2);
  op.shape(3, op[2].shape);
  const int64_t dim = op[2].dim(-1), tokens = op[2].dim(0);
  op.require(dim % 2 == 0 && tokens > 0, "there must be tokens, and heads of an even size");
  for (int i : {0, 1}) {
    op.require(op[i].size() % (tokens * dim) == 0 && op[i].dim(-1) % dim == 0,
               "cos must have a row for each token and a head's size");
    op.shape(5 + i, op[i].shape);
    op.require(op[5 + i].type == op[i].type, "the outputs must have the inputs' dtypes");
  }
  op.run([=](const Tensors &t) {
    const auto cos = read<float>(t[2]), sin = read<float>(t[3]);
    for (int i : {0, 1}) {
      const auto x = read<float>(t[i]);
      std::vector<float> out(x.size());
      const int64_t heads = x.size() / (tokens * dim), half = dim / 2;
      for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t head = 0; head < heads; ++head) {
          const float *from = x.data() + (token * heads + head) * dim;
          float *to = out.data() + (token * heads + head) * dim;
          const float *c = cos.data() + token * dim, *s = sin.data() + token * dim;
          for (int64_t j = 0; j < dim; ++j) to[j] = from[j] * c[j] + (j < half ? -from[j + half] : from[j - half]) * s[j];
        }
      }
      write(t[5 + i], out);
    }
  });
}

}  // namespace
}  // namespace sim

namespace mindspore::internal {
InternalOpPtr CreateApplyRotaryPosEmbOp(const InputsImmutableInfoList &inputs, const OutputsImmutableInfoList &outputs,
                                        const ApplyRotaryPosEmbParam &param, const std::string &name) {
  const int32_t cos_format = param.cos_format;
  return sim::make_internal(inputs, outputs, name, [cos_format](sim::Op &op) { sim::rotate(op, cos_format); });
}
}  // namespace mindspore::internal
