// Cross entropy, and what the optimizer does to parameters.
#include <cmath>

#include "operator.h"
#include "pool.h"

// logits (N, V), labels (N), weights (N) → weighted losses (N), and the gradient of their sum in the logits.
OPERATOR(cross_entropy) {
    const int64_t rows = in.size(0, 0), width = in.size(0, 1);
    parallel(rows, [&](int64_t row) {
        const float *x = in.floats(0) + row * width, weight = in.floats(2)[row];
        float* gradient = in.floats(4) + row * width;
        const Exponentials found = exponentials(x, width, gradient);
        const float share = weight / found.sum;
        const int32_t label = in.ints(1)[row];
        in.floats(3)[row] = (std::log(found.sum) - (x[label] - found.largest)) * weight;
        for (int64_t i = 0; i < width; i += LANES)
            store_first(gradient + i, load_first(gradient + i, width - i) * share, width - i);
        gradient[label] -= weight;
    });
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
