"""Binding of WeightQuantBatchMatmul, products with weights that stay 8 or 4 bits wide in a card's memory.

It computes x·(scale ⊙ values): what MindSpore asks CANN for is aclnnWeightQuantBatchMatmulV2, whose documentation says
what a 910B takes. Weights lie as (in, out), which it recommends for groups; of 4 bits two outputs share a byte (MindSpore's
qint4x2), the first in the lower bits. It has no gradient. Scales have x's dtype, so in bfloat16 a float16 scale of the file
keeps 8 of its 11 bits.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops import auto_generate

from telechat.errors import InputError

GROUP, LARGEST = 32, 65535  # what the inputs of a group are a multiple of; the most inputs, or outputs


def obstacle(weight, dtype):
    """Why a `QuantisedWeight` cannot be multiplied so by activations of a dtype, or None."""
    outputs, inputs = weight.values.shape
    group = inputs // weight.scales.shape[1]
    if dtype not in (ms.float16, ms.bfloat16):
        return f"WeightQuantBatchMatmul takes float16 and bfloat16, not {str(dtype).lower()}"
    if group < inputs and group % GROUP:
        return f"WeightQuantBatchMatmul takes groups of a multiple of {GROUP} inputs, not {group}"
    if max(outputs, inputs) > LARGEST:
        return f"WeightQuantBatchMatmul takes at most {LARGEST} inputs and outputs, not {max(outputs, inputs)}"
    if weight.bits == 4 and outputs % 2:
        return f"WeightQuantBatchMatmul takes an even number of outputs of 4 bits, not {outputs}"
    return None


def tensors(weight, dtype):
    """A `QuantisedWeight` as `quantised_matmul` takes it.

    Returns:
        (Tensor, Tensor): values, int8 (in, out) or qint4x2 (in, out / 2); scales in ``dtype``, (groups, out), of one group (out,).
    """
    values = np.ascontiguousarray(weight.values.T)
    if weight.bits == 4:
        nibbles = values.view(np.uint8) & 15
        values = Tensor((nibbles[:, ::2] | nibbles[:, 1::2] << 4).view(np.int8), dtype=ms.qint4x2)
    else:
        values = Tensor.from_numpy(values)
    scales = weight.scales[:, 0] if weight.scales.shape[1] == 1 else weight.scales.T
    return values, Tensor.from_numpy(np.ascontiguousarray(scales)).astype(dtype)


def quantised_matmul(x, values, scales):
    """x (N, in), float16 or bfloat16, with what `tensors` gives: (N, out) in x's dtype.

    Without a bias: MindSpore would have it in bfloat16 where x is, and CANN in float32.

    Raises:
        InputError: an argument is wrong; the message names it.
    """
    _check(x.shape, x.dtype, values.shape, values.dtype, scales.shape, scales.dtype)
    group = 0 if len(scales.shape) == 1 else x.shape[1] // scales.shape[0]
    return auto_generate.WeightQuantBatchMatmul(False, False, group)(x, values, scales)


def _refuse(argument, what):
    raise InputError(f"quantised product: {argument} {what}")


@ops.constexpr
def _check(x, dtype, values, values_dtype, scales, scales_dtype):
    if len(x) != 2 or dtype not in (ms.float16, ms.bfloat16):
        _refuse("x", f"must be float16 or bfloat16 of two dimensions, not {dtype} {tuple(x)}")
    if values_dtype not in (ms.int8, ms.qint4x2):
        _refuse("values", f"must be int8 or qint4x2, not {values_dtype}")
    if len(values) != 2 or values[0] != x[1]:
        _refuse("values", f"must be ({x[1]}, outputs), not {tuple(values)}")
    outputs = values[1] * (2 if values_dtype == ms.qint4x2 else 1)
    if max(x[1], outputs) > LARGEST:
        _refuse("values", f"must have at most {LARGEST} inputs and outputs, not {x[1]} and {outputs}")
    if scales_dtype != dtype:
        _refuse("scales", f"must be {dtype} as x is, not {scales_dtype}")
    if tuple(scales) == (outputs,):
        return
    if len(scales) != 2 or scales[1] != outputs or x[1] % scales[0]:
        _refuse("scales", f"must be ({outputs},) or (groups, {outputs}), not {tuple(scales)}")
    group = x[1] // scales[0]
    if group % GROUP or group == x[1]:
        _refuse("scales", f"must be of groups of a multiple of {GROUP} inputs fewer than {x[1]}, not of {group}")
