"""How a weight's values are chosen: rounded to the nearest, or by GPTQ (Frantar et al., arXiv:2210.17323).

Quantisation is symmetric, W[o, i] = scale · (q[o, i] − 2^(bits−1)) with 0 ≤ q < 2^bits, and the scale of a group of inputs
is 2·max|W| / (2^bits − 1), in float16 as it is stored.
"""

import numpy as np

from telechat.quantization.gptq import Product

BLOCK = 128  # columns whose errors are put on those behind them together (section 3.3, "Lazy Batch-Updates")
DAMPING = 0.01  # share of the mean of the Hessian's diagonal that is added to it (section 3.3, "Cholesky Reformulation")


def scales_of(weight, bits):
    """Scales of rows (out, group), float32 (out,) rounded to float16; 1 where all is zero."""
    scales = (2 * np.abs(weight).max(1) / (2 ** bits - 1)).astype(np.float16).astype(np.float32)
    return np.where(scales == 0, np.float32(1), scales)


def rounded(weight, scales, bits):
    """q of some columns (out, n) with scales (out,): float32 whole numbers."""
    middle = 2 ** (bits - 1)
    return np.clip(np.rint(weight / scales[:, None]) + middle, 0, 2 ** bits - 1)


def round_to_nearest(weight, bits, group):
    """The `Product` nearest to a weight, float32 (out, in).

    group (int): inputs of a group, which divides their number.
    """
    values, scales = np.empty(weight.shape, np.uint8), []
    for first in range(0, weight.shape[1], group):
        part = weight[:, first:first + group]
        scales.append(scales_of(part, bits))
        values[:, first:first + group] = rounded(part, scales[-1], bits)
    return _product(values, scales, bits, group)


def gptq(weight, hessian, bits, group):
    """The `Product` for a weight, float32 (out, in), whose columns make up for the errors of those before them.

    Args:
        weight (array): the weight.
        hessian (array): float64 (in, in): Σ x·xᵀ over the inputs x of the calibration.
        bits, group (int): as of `round_to_nearest`.
    """
    weight, inputs = weight.astype(np.float32), weight.shape[1]
    hessian = hessian.astype(np.float64)
    unused = np.diag(hessian) == 0  # inputs that were never anything but 0: their weights say nothing
    hessian[unused, unused] = 1
    weight[:, unused] = 0
    hessian[np.diag_indices(inputs)] += DAMPING * np.diag(hessian).mean()
    # The upper Cholesky factor of the inverse: row i holds what is left for the columns behind i (equations 4 and 5).
    inverse = np.linalg.cholesky(np.linalg.inv(hessian)).T.astype(np.float32)
    values, scales = np.empty(weight.shape, np.uint8), []
    for first in range(0, inputs, BLOCK):
        last = min(first + BLOCK, inputs)
        part, errors = weight[:, first:last].copy(), np.empty((len(weight), last - first), np.float32)
        for i in range(first, last):
            if i % group == 0:
                behind = part[:, i - first:i - first + group], weight[:, last:max(i + group, last)]
                scales.append(scales_of(np.concatenate(behind, 1), bits))
            column = part[:, i - first]
            q = rounded(column[:, None], scales[-1], bits)[:, 0]
            values[:, i] = q
            error = (column - scales[-1] * (q - 2 ** (bits - 1))) / inverse[i, i]
            part[:, i - first:] -= np.outer(error, inverse[i, i:last])
            errors[:, i - first] = error
        weight[:, last:] -= errors @ inverse[first:last, last:]
    return _product(values, scales, bits, group)


def _product(values, scales, bits, group):
    scales = np.stack(scales).astype(np.float16)
    groups = (np.arange(values.shape[1]) // group).astype(np.int32)
    return Product(np.ascontiguousarray(values.T), np.full(scales.shape, 2 ** (bits - 1), np.int16), scales, groups)


def relative_error(weight, product, hessian=None):
    """‖(W − Ŵ)X‖² / ‖WX‖² over the calibration's inputs X; without them ‖W − Ŵ‖² / ‖W‖²."""
    wrong = weight - product.dequantised()
    if hessian is None:
        return float(np.square(wrong, dtype=np.float64).sum() / max(np.square(weight, dtype=np.float64).sum(), 1e-300))
    hessian = hessian.astype(np.float32)
    sums = [np.einsum("oi,oi->", part @ hessian, part, dtype=np.float64) for part in (wrong, weight)]
    return float(sums[0] / max(sums[1], 1e-300))
