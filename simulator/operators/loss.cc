// CrossEntropyLoss and its gradient. Sources: headers aclnn_cross_entropy_loss{,_grad}.h of CANN 8.1, documentation of
// ops-nn, ops_910b_cann81.json. The z-loss is refused: on a 910B it is not supported either.
#include <cmath>
#include <algorithm>

#include "gemm.h"
#include "../sim.h"

namespace sim {
namespace {

struct LossSettings {
  std::string reduction;
  int64_t ignored;
  float smoothing;
};

LossSettings settings_of(Op &op, const char *reduction, int64_t ignored, double smoothing, double z_scale) {
  LossSettings settings{op.setting("reduction", reduction), op.setting("ignoreIndex", ignored),
                        static_cast<float>(op.setting("labelSmoothing", smoothing))};
  op.setting("lseSquareScaleForZloss", z_scale);
  const auto &name = settings.reduction;
  op.require(name == "none" || name == "mean" || name == "sum", "reduction must be none, mean or sum");
  op.require(smoothing >= 0 && smoothing <= 1, "labelSmoothing must be in 0 to 1, not %g", smoothing);
  op.require(z_scale == 0, "lseSquareScaleForZloss is not supported: it must be 0");
  return settings;
}

// A class's weight; 1 without weights.
float weight_of(const std::vector<float> &weights, int64_t label) { return weights.empty() ? 1.0f : weights[label]; }

void check_labels(const std::vector<int64_t> &labels, int64_t ignored, int64_t classes) {
  for (size_t i = 0; i < labels.size(); ++i) {
    if (labels[i] != ignored && (labels[i] < 0 || labels[i] >= classes)) {
      fail("target %ld at %zu is outside 0 to %ld", labels[i], i, classes - 1);
    }
  }
}

// What losses are divided by: their weights' sum for the mean, else 1.
float divisor_of(const LossSettings &settings, const std::vector<int64_t> &labels, const std::vector<float> &weights) {
  if (settings.reduction != "mean") return 1;
  float total = 0;
  for (int64_t label : labels) total += label == settings.ignored ? 0 : weight_of(weights, label);
  return total;
}

}  // namespace
}  // namespace sim

using namespace sim;

SIM_OPERATOR(aclnnCrossEntropyLoss)
extern "C" int aclnnCrossEntropyLossGetWorkspaceSize(
    const aclTensor *input, const aclTensor *target, const aclTensor *weight, char *reduction, int64_t ignored,
    double smoothing, double z_scale, bool return_z, const aclTensor *loss, const aclTensor *log_probabilities,
    const aclTensor *z_loss, const aclTensor *log_sums, uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnCrossEntropyLoss", workspace, executor, [&](Op &op) {
    const int x = op.input("input", input), y = op.input("target", target), w = op.optional("weight", weight),
              l = op.output("lossOut", loss), p = op.output("logProbOut", log_probabilities);
    op.optional("zlossOut", z_loss);
    op.optional("lseForZlossOut", log_sums);
    const LossSettings settings = settings_of(op, reduction, ignored, smoothing, z_scale);
    op.require(!op.setting("returnZloss", return_z), "returnZloss is not supported");
    op.rank(x, 2, 2);
    op.types(x, {FLOAT16, FLOAT32, BFLOAT16});
    op.types(y, {INT64});
    op.types(w, {FLOAT32});
    for (int i : {l, p}) op.types(i, {op[x].type});
    const int64_t count = op[x].shape[0], classes = op[x].shape[1];
    op.require(classes > 0, "input has no classes");
    op.shape(y, {count});
    op.shape(w, {classes});
    op.shape(p, op[x].shape);
    op.require(op[l].size() == (settings.reduction == "none" ? count : 1), "lossOut has %ld elements", op[l].size());
    op.run([=](const Tensors &t) {
      auto values = read<float>(t[x]);
      const auto labels = read<int64_t>(t[y]);
      const auto weights = t[w] ? read<float>(t[w]) : std::vector<float>();
      check_labels(labels, settings.ignored, classes);
      std::vector<float> losses(count);
      in_parallel(count, 10.0 * values.size(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          float *row = values.data() + i * classes;
          const float largest = *std::max_element(row, row + classes);
          float total = 0, smooth = 0;
          for (int64_t c = 0; c < classes; ++c) total += std::exp(row[c] - largest);
          const float log_sum = largest + std::log(total);
          for (int64_t c = 0; c < classes; ++c) row[c] -= log_sum, smooth -= row[c] * weight_of(weights, c);
          if (labels[i] == settings.ignored) continue;
          losses[i] = (1 - settings.smoothing) * -row[labels[i]] * weight_of(weights, labels[i]) +
                      settings.smoothing * smooth / classes;
        }
      });
      write(t[p], values);
      if (settings.reduction == "none") return write(t[l], losses);
      float total = 0;
      for (float loss : losses) total += loss;
      write(t[l], std::vector<float>{total / divisor_of(settings, labels, weights)});
    });
  });
}

SIM_OPERATOR(aclnnCrossEntropyLossGrad)
extern "C" int aclnnCrossEntropyLossGradGetWorkspaceSize(
    const aclTensor *gradient, const aclTensor *log_probabilities, const aclTensor *target, const aclTensor *weight,
    const aclTensor *z_gradient, const aclTensor *log_sums, char *reduction, int64_t ignored, double smoothing,
    double z_scale, const aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
  return plan("aclnnCrossEntropyLossGrad", workspace, executor, [&](Op &op) {
    const int d = op.input("gradLoss", gradient), p = op.input("logProb", log_probabilities),
              y = op.input("target", target), w = op.optional("weight", weight),
              z = op.optional("gradZloss", z_gradient), s = op.optional("lseForZloss", log_sums),
              dx = op.output("out", out);
    const LossSettings settings = settings_of(op, reduction, ignored, smoothing, z_scale);
    op.require(!op[z] && !op[s], "gradZloss and lseForZloss are not supported");
    op.rank(p, 2, 2);
    op.types(p, {FLOAT16, FLOAT32, BFLOAT16});
    op.types(y, {INT64});
    op.types(w, {FLOAT32});
    for (int i : {d, dx}) op.types(i, {op[p].type});
    const int64_t count = op[p].shape[0], classes = op[p].shape[1];
    op.shape(y, {count});
    op.shape(w, {classes});
    op.shape(dx, op[p].shape);
    op.require(op[d].size() == (settings.reduction == "none" ? count : 1), "gradLoss has %ld elements", op[d].size());
    op.run([=](const Tensors &t) {
      auto values = read<float>(t[p]);
      const auto incoming = read<float>(t[d]);
      const auto labels = read<int64_t>(t[y]);
      const auto weights = t[w] ? read<float>(t[w]) : std::vector<float>();
      check_labels(labels, settings.ignored, classes);
      const float divisor = divisor_of(settings, labels, weights);
      float all_weights = 0;
      for (int64_t c = 0; c < classes; ++c) all_weights += weight_of(weights, c);
      in_parallel(count, 8.0 * values.size(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          float *row = values.data() + i * classes;
          if (labels[i] == settings.ignored) {
            std::fill(row, row + classes, 0.0f);
            continue;
          }
          const float coming = incoming[incoming.size() == 1 ? 0 : i] / divisor;
          const float label_part = coming * (1 - settings.smoothing) * weight_of(weights, labels[i]);
          const float smooth = coming * settings.smoothing / classes;
          for (int64_t c = 0; c < classes; ++c) {
            row[c] = std::exp(row[c]) * (label_part + smooth * all_weights) - smooth * weight_of(weights, c);
          }
          row[labels[i]] -= label_part;
        }
      });
      write(t[dx], values);
    });
  });
}
