"""What training counts on beside the kernels' numbers: dropout drawn where it is used, gradients summed in float32."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from telechat.nn.device import on_cpu
from telechat.nn.dropout import ATTENTION_OUTPUT, Place, dropout_mask
from telechat.nn.graphs import Accumulate
from telechat.nn.self_test import kept_factors

_LENGTH, _HEADS, _DEVIATIONS = 256, 4, 5


class Written(nn.Cell):
    """A compiled graph that writes keys and values into views of a cache, as `Kernels.write_cache` takes them."""

    def __init__(self, kernels):
        super().__init__()
        self.kernels = kernels

    @ms.jit
    def construct(self, key_cache, value_cache, key, value, index):
        return self.kernels.write_cache(key_cache, value_cache, key, value, index)


class Total(nn.Cell):
    """A compiled graph that adds up a tensor in float32."""

    @ms.jit
    def construct(self, x):
        return ops.sum(x.astype(ms.float32))


def dropout_problems(kernels):
    """What is wrong with the masks of `Kernels` whose ``keep_prob`` is below 1: a list of sentences."""
    rate, place = 1 - kernels.keep_prob, Place(seed=1, step=1, sequences=(0,), layer=0)

    def of_attention(place):
        heads = range(_HEADS)
        return kept_factors(kernels.attention_dropout(_LENGTH, rate, place, heads), _LENGTH, rate, place, heads)[0]

    def of_output(place):
        mask = kernels.output_dropout(_LENGTH, _LENGTH, rate, place, ATTENTION_OUTPUT)
        return mask.astype(ms.float32).asnumpy().reshape(1, _LENGTH, _LENGTH)

    problems = []
    for what, draw, streams in (("attention", of_attention, range(_HEADS)), ("outputs", of_output, [ATTENTION_OUTPUT])):
        mask, again, elsewhere = draw(place), draw(place), draw(place._replace(layer=1))
        kept = mask > 0
        allowed = _DEVIATIONS * (rate * (1 - rate) / mask.size) ** 0.5
        on_host = dropout_mask(_LENGTH, _LENGTH, rate, place, streams)[0] > 0
        if not on_cpu() and np.array_equal(kept, on_host):
            problems.append(f"dropout masks of {what} are drawn on the host, where a layer's take seconds")
        if abs(kept.mean() - kernels.keep_prob) > allowed:
            problems.append(f"dropout of {what} keeps {kept.mean():.4f} of all values, should be {kernels.keep_prob:.4f}")
        if abs(mask[kept].mean() * kernels.keep_prob - 1) > 0.01:
            problems.append(f"dropout of {what} multiplies what it keeps by {mask[kept].mean():.4f}, should be "
                            f"{1 / kernels.keep_prob:.4f}")
        if not np.array_equal(mask, again):
            problems.append(f"dropout of {what} draws other masks when a block is computed again")
        if np.array_equal(kept, elsewhere > 0):
            problems.append(f"dropout of {what} draws the same masks in every layer")
    return problems


def sum_problems(kernels):
    """Whether sums of gradients keep parts that are small beside them: a list of no or one sentence."""
    add, dtype = Accumulate(kernels), kernels.dtype
    total, part = [Tensor(np.full(8, value, np.float32)).astype(dtype) for value in (16, 1 / 256)]
    for _ in range(64):
        total = add(total, part)[0]
    found = float(total.astype(ms.float32).asnumpy()[0])
    return [] if found == 16.25 else [f"sums of gradients lose small parts: 16 and 64 times 1/256 gave {found}, should be 16.25"]
