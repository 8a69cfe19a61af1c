// AdamW in one operator. Sources: header aclnn_apply_adam_w_v2.h of CANN 8.1, documentation and kernel of ops-nn,
// ops_910b_cann81.json. The kernel adds 1 to the step it is given: a first update has step 0.
#include <cmath>

#include "gemm.h"
#include "../sim.h"

using namespace sim;

SIM_OPERATOR(aclnnApplyAdamWV2)
extern "C" int aclnnApplyAdamWV2GetWorkspaceSize(aclTensor *weight, aclTensor *first, aclTensor *second,
                                                 aclTensor *largest, const aclTensor *gradient, const aclTensor *step,
                                                 float rate, float beta1, float beta2, float decay, float epsilon,
                                                 bool amsgrad, bool maximize, uint64_t *workspace,
                                                 aclOpExecutor **executor) {
  return plan("aclnnApplyAdamWV2", workspace, executor, [&](Op &op) {
    const int w = op.output("varRef", weight), m = op.output("mRef", first), v = op.output("vRef", second),
              n = op.optional("maxGradNormOptionalRef", largest), g = op.input("grad", gradient),
              s = op.input("step", step);
    op.setting("lr", rate), op.setting("beta1", beta1), op.setting("beta2", beta2);
    op.setting("weightDecay", decay), op.setting("eps", epsilon);
    op.setting("amsgrad", amsgrad), op.setting("maximize", maximize);
    op.types(w, {FLOAT32, FLOAT16, BFLOAT16});
    for (int i : {m, v}) op.types(i, {op[w].type});
    // Masters in float32 may take a gradient of 16 bits; the other way round is refused.
    if (op[w].type == FLOAT32) op.types(g, {FLOAT32, FLOAT16, BFLOAT16});
    else op.types(g, {op[w].type});
    op.types(s, {FLOAT32, INT64});
    op.require(op[s].size() == 1, "step must have one element, not %ld", op[s].size());
    for (int i : {m, v, g}) op.shape(i, op[w].shape);
    if (amsgrad) {
      op.require(bool(op[n]), "amsgrad needs maxGradNormOptionalRef");
      op.types(n, {op[g].type});
      op.shape(n, op[w].shape);
    }
    op.run([=](const Tensors &t) {
      auto weights = read<float>(t[w]), firsts = read<float>(t[m]), seconds = read<float>(t[v]);
      auto norms = amsgrad ? read<float>(t[n]) : std::vector<float>();
      const auto gradients = read<float>(t[g]);
      const double count = read<double>(t[s])[0] + 1;
      const float correction1 = 1 - std::pow(double(beta1), count), correction2 = 1 - std::pow(double(beta2), count);
      in_parallel(weights.size(), 15.0 * weights.size(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const float change = maximize ? -gradients[i] : gradients[i];
          firsts[i] = beta1 * firsts[i] + (1 - beta1) * change;
          seconds[i] = beta2 * seconds[i] + (1 - beta2) * change * change;
          if (amsgrad) norms[i] = std::max(norms[i], seconds[i]);
          const float size = std::sqrt((amsgrad ? norms[i] : seconds[i]) / correction2) + epsilon;
          weights[i] = weights[i] * (1 - rate * decay) - rate / correction1 * firsts[i] / size;
        }
      });
      write(t[w], weights);
      write(t[m], firsts);
      write(t[v], seconds);
      if (amsgrad) write(t[n], norms);
    });
  });
}
