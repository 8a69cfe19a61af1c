"""Calls of CANN's operations past their limits, and ours, which test_limits.py has on_card.py run on the simulated card."""

import mindspore as ms
import numpy as np


def limits():
    """Of each limit of CANN's operations that our calls stay within: what the card says to a call that does not, and to ours.

    {name: [sentence or None of the wrong call, the same of ours]}. What ours do beside calling an operation is laid out here:
    casts, other layouts, a step of one element, masks of whole groups of 128 bits.
    """
    from mindspore import Tensor, ops

    from telechat.nn import ascend_kernels as ascend
    from telechat.nn.ascend import AscendKernels

    def ones(*shape, dtype=ms.bfloat16):
        return ops.ones(shape, dtype)

    def said(call):
        try:
            results = call()
            for result in results if isinstance(results, (tuple, list)) else [results]:
                result.asnumpy()
        except (RuntimeError, ValueError, TypeError) as error:
            return str(error)
        return None

    def adamw(step=(0.0,), step_dtype=ms.float32, moments=ms.float32, master=ms.float32, gradient=ms.bfloat16):
        scalars = [Tensor(step, step_dtype), *ascend.adamw_scalars(1, 0.1, (0.9, 0.95), 1e-8, 0.1)[1:6]]
        return ascend.adamw(ones(4, 4, dtype=master), ones(4, 4, dtype=moments), ones(4, 4, dtype=moments),
                            ones(4, 4, dtype=gradient), *scalars)

    kernels, labels, odd = AscendKernels(ms.bfloat16), Tensor([3, 10], ms.int32), (3, 5)
    losses, weights = ones(2, 11, dtype=ms.float32), ones(2, dtype=ms.float32)
    table, wide = ones(1, 1, 2, 32), ones(1, 1, 2, 32, dtype=ms.float32)
    bits = ascend.dropout_bits(8, 24, 0.1, [1], ms.bfloat16)
    calls = {
        "heads before few tokens": (lambda: ascend.rotate(ones(2, 20, 2, 32), table, table),
                                    lambda: kernels.rotate(ones(2, 2, 20, 32), table, table)),
        "rotary tables of another dtype": (lambda: ascend.rotate(ones(1, 2, 4, 32), *[wide.reshape(1, 2, 1, 32)] * 2),
                                           lambda: ascend.rotate(ones(1, 2, 4, 32), *[kernels.rotary_tensor(
                                               np.ones((1, 2, 1, 32), np.float32))] * 2)),
        "labels of 32 bits": (lambda: ascend._cross_entropy(losses, labels, None, "none", -100, 0.0, 0.0, False),
                              lambda: ascend.token_cross_entropy(losses, labels, weights)),
        "gradients of another dtype than the logits": (
            lambda: ascend._cross_entropy_gradient(weights.astype(ms.bfloat16), losses, labels.astype(ms.int64), None, None,
                                                   None, "none", -100, 0.0, 0.0),
            lambda: ascend.token_cross_entropy(losses.astype(ms.bfloat16), labels, weights)),
        "a step of several elements": (lambda: adamw([0.0, 0.0]), adamw),
        "a step of 32 bits": (lambda: adamw([0], ms.int32), lambda: adamw([0], ms.int64)),
        "moments of another dtype": (lambda: adamw(moments=ms.bfloat16), lambda: adamw(gradient=ms.float16)),
        "a gradient wider than the weight": (lambda: adamw(master=ms.bfloat16, moments=ms.bfloat16, gradient=ms.float32),
                                             lambda: adamw(gradient=ms.float32)),
        "a dropout mask cut at its bytes": (lambda: ascend._apply_bits(ones(8, 24), bits[0], 0.1),
                                            lambda: ascend.dropout_mask(8, 24, 0.1, [1], ms.bfloat16)),
        "a rate above 1": (lambda: ascend.dropout_bits(8, 24, 1.5, [1], ms.bfloat16),
                           lambda: ascend.dropout_bits(8, 24, 0.5, [1], ms.bfloat16)),
        "a dropout mask for whole numbers": (lambda: ascend.dropout_mask(8, 24, 0.1, [1], ms.int32),
                                             lambda: ascend.dropout_mask(8, 24, 0.1, [1], ms.float16)),
        "a norm's weight narrower than its input": (
            lambda: ascend.rms_norm(ones(2, 32, dtype=ms.float32), ones(32), 1e-5),
            lambda: ascend.rms_norm(ones(2, 32), ones(32, dtype=ms.float32), 1e-5)),
        "a norm's weight of another width": (lambda: ascend.rms_norm(ones(2, 32), ones(16), 1e-5),
                                             lambda: ascend.rms_norm(ones(2, 32), ones(32), 1e-5)),
        "a sum of two dtypes in a norm": (lambda: ascend.add_rms_norm(ones(2, 32), ones(2, 32, dtype=ms.float32), ones(32), 1e-5),
                                          lambda: ascend.add_rms_norm(ones(2, 32), ones(2, 32), ones(32), 1e-5)),
        "halves that are none": (lambda: ops.swiglu(ones(*odd), -1), lambda: ascend.swiglu(ones(*odd), ones(*odd))),
        "factors of two dtypes": (lambda: ascend._matmul(ones(2, 32), ones(8, 32, dtype=ms.float32)),
                                  lambda: ascend.linear(ones(2, 32), ones(8, 32, dtype=ms.float32), None)),
    }
    return {name: [said(wrong), said(ours)] for name, (wrong, ours) in calls.items()}
