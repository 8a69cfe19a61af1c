// Cross entropy, and what the optimizer does to parameters.
#include <algorithm>
#include <cmath>

#include "operator.h"
#include "pool.h"

namespace {

constexpr int64_t LOGITS = 1 << 23;  // that the head makes at a time

// Logits of a row → its weighted loss, and the gradient in the logits times `scale`, which may lie in their place.
float row_loss(const float* logits, int64_t width, int32_t label, float weight, float scale, float* gradient) {
    const float of_label = logits[label];
    const Exponentials found = exponentials(logits, width, gradient);
    const float share = weight / found.sum * scale;
    for (int64_t i = 0; i < width; i += LANES)
        store_first(gradient + i, load_first(gradient + i, width - i) * share, width - i);
    gradient[label] -= weight * scale;
    return (std::log(found.sum) - (of_label - found.largest)) * weight;
}

// x (N, H), head (V, H), labels (N), weights (N), what logits are multiplied by, rounded → weighted losses (N), and the
// gradients of their sum in x and, where `dhead` is one, in the head. Rows at the end without weight cost nothing.
void losses_and_gradients(const Arguments& in, float* losses, float* dx, float* dhead) {
    const int64_t width = in.size(0, 1), vocabulary = in.size(1, 0);
    const float scale = in.scalar(4);
    const bool rounded = in.scalar(5) != 0;
    int64_t rows = in.size(0, 0);
    for (; rows > 0 && in.floats(3)[rows - 1] == 0; rows--) {
        losses[rows - 1] = 0;
        std::fill(dx + (rows - 1) * width, dx + rows * width, 0.0f);
    }
    if (rows == 0 && dhead != nullptr) std::fill(dhead, dhead + vocabulary * width, 0.0f);
    const int64_t most = std::max<int64_t>(1, LOGITS / vocabulary), parts = (rows + most - 1) / most;
    for (int64_t part = 0; part < parts; part++) {
        const int64_t first = rows * part / parts, count = rows * (part + 1) / parts - first;
        float* logits = scratch(16, most * vocabulary);
        const Matrix x{in.floats(0) + first * width, Type::float32, width, 1}, head{in.data[1], in.type(1), width, 1};
        const Matrix dlogits{logits, Type::float32, vocabulary, 1};
        product(count, vocabulary, width, x, head.transposed(), logits, vocabulary, rounded);
        parallel(count, [&](int64_t i) {
            float* row = logits + i * vocabulary;
            for (int64_t j = 0; scale != 1 && j < vocabulary; j++) row[j] *= scale;
            losses[first + i] = row_loss(row, vocabulary, in.ints(2)[first + i], in.floats(3)[first + i], scale, row);
        });
        product(count, width, vocabulary, dlogits, head, dx + first * width, width, rounded);
        if (dhead != nullptr)
            product(vocabulary, width, count, dlogits.transposed(), x, dhead, width, rounded, {}, part > 0);
    }
}

}  // namespace

// logits (N, V), labels (N), weights (N) → weighted losses (N), and the gradient of their sum in the logits.
OPERATOR(cross_entropy) {
    const int64_t width = in.size(0, 1);
    parallel(in.size(0, 0), [&](int64_t row) {
        in.floats(3)[row] = row_loss(in.floats(0) + row * width, width, in.ints(1)[row], in.floats(2)[row], 1,
                                     in.floats(4) + row * width);
    });
    return 0;
}

// As `losses_and_gradients`.
OPERATOR(head_loss) {
    losses_and_gradients(in, in.floats(6), in.floats(7), in.floats(8));
    return 0;
}

// The same of a head that is frozen.
OPERATOR(frozen_head_loss) {
    losses_and_gradients(in, in.floats(6), in.floats(7), nullptr);
    return 0;
}

// Any number of tensors → the sum of squares of each, (count): of blocks, added up in their order in double.
OPERATOR(sums_of_squares) {
    for (int tensor = 0; tensor + 1 < count; tensor++) {
        const float* x = in.floats(tensor);
        const int64_t elements = in.elements(tensor), blocks = (elements + ELEMENTS - 1) / ELEMENTS;
        float* partial = scratch(4, blocks);
        parallel_stretches(elements, ELEMENTS, [&](int64_t first, int64_t width) {
            Floats sums[4] = {};
            for (int64_t i = 0; i < width; i += LANES) {
                Floats part = load_first(x + first + i, width - i);
                sums[i / LANES % 4] += part * part;
            }
            partial[first / ELEMENTS] = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
        });
        double total = 0;
        for (int64_t block = 0; block < blocks; block++) total += partial[block];
        in.floats(count - 1)[tensor] = static_cast<float>(total);
    }
    return 0;
}

// torch's AdamW (arXiv:1711.05101) in place: parameter, first and second moment, gradient, what that is multiplied by,
// and the scalars of portable_kernels.adamw_scalars: rate and ε with the bias corrections in them, and what decay leaves.
// The last: a bfloat16 copy of the parameter, or none.
OPERATOR(adamw) {
    float *parameter = in.floats(0), *first = in.floats(1), *second = in.floats(2);
    const float* gradient = in.floats(3);
    const float clip = in.scalar(4), rate = in.scalar(5), beta1 = in.scalar(6), beta2 = in.scalar(7);
    const float epsilon = in.scalar(8), left = in.scalar(9);
    bfloat16* copy = in.absent(10) ? nullptr : static_cast<bfloat16*>(in.data[10]);
    by_vectors(in.elements(0), [=](int64_t i, int64_t width) {
        const Floats g = load_first(gradient + i, width) * clip;
        const Floats mean = beta1 * load_first(first + i, width) + (1 - beta1) * g;
        const Floats square = beta2 * load_first(second + i, width) + (1 - beta2) * g * g;
        store_first(first + i, mean, width);
        store_first(second + i, square, width);
        const Floats updated = load_first(parameter + i, width) * left - rate * mean / (square_root(square) + epsilon);
        store_first(parameter + i, updated, width);
        if (copy != nullptr) store_first(copy + i, updated, width);
    });
    return 0;
}

// Float32 numbers → the nearest bfloat16 ones, in a tensor that is there.
OPERATOR(round_to_bfloat16) {
    bfloat16* to = static_cast<bfloat16*>(in.data[1]);
    by_vectors(in.elements(0), [=](int64_t i, int64_t left) { store_first(to + i, load_first(in.floats(0) + i, left), left); });
    return 0;
}
