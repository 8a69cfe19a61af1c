"""Weights of 8 or 4 bits with a scale for each group of inputs: W[o, i] = scale[o, group of i] · value[o, i].

What a product is made with is a tuple of tensors: values, scales and, where groups are not runs of inputs, the order of
inputs in which they are. Where a device has no operation of its own for them (quantised_matmul.py), scales are float32 (out,
groups) and values int8 (out, in) for 8 bits; for 4 bits uint8 (out, in / 2, filled up to whole chunks), a chunk of 128
inputs being 16 little-endian words of 32 bits: bits 4k to 4k + 3 of word w hold input 16·k + w, plus 8. So a vector of words
gives one of weights for each of eight shifts.
"""

import dataclasses

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from telechat.nn.device import device_parameter, move_to_device, on_cpu
from telechat.nn.large_pages import in_large_pages

CHUNK, WORDS, NIBBLES = 128, 16, 8  # inputs of a chunk of 4-bit values, its words, values of a word
SMALLEST_GROUP = 16  # inputs; a group is whole vectors of weights


@dataclasses.dataclass(frozen=True)
class QuantisedWeight:
    """A product's weight as numpy arrays.

    Attributes:
        bits (int): 8 or 4.
        values (array): int8 (out, in), from −2^(bits−1) to 2^(bits−1) − 1, the inputs of a group side by side.
        scales (array): float32 (out, groups); a group is in / groups inputs.
        order (array): int32 (in,), which input each column of ``values`` is for; None: they stand in order.
    """

    bits: int
    values: np.ndarray
    scales: np.ndarray
    order: np.ndarray = None

    def dequantised(self):
        """The weight, float32 (out, in), with the inputs in order."""
        group = self.values.shape[1] // self.scales.shape[1]
        weight = self.values.astype(np.float32) * np.repeat(self.scales, group, 1)
        if self.order is None:
            return weight
        result = np.empty_like(weight)
        result[:, self.order] = weight
        return result

    def packed(self):
        """The values as this module's docstring has them."""
        if self.bits == 8:
            return np.ascontiguousarray(self.values)
        outputs, inputs = self.values.shape
        chunks = -(-inputs // CHUNK)
        values = np.full((outputs, chunks * CHUNK), 8, np.uint32)
        values[:, :inputs] = self.values.astype(np.int32) + 8
        shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
        words = (values.reshape(outputs, chunks, NIBBLES, WORDS) << shifts).sum(2, dtype=np.uint32)
        return words.astype("<u4").view(np.uint8).reshape(outputs, -1)


def weight_parameters(value, dtype, kernels=None):
    """What a product is made with: a Parameter in ``dtype`` of an array, or the tuple of a `QuantisedWeight`.

    kernels (Kernels): those that will compute with it; None: as this module's docstring has it.
    """
    if not isinstance(value, QuantisedWeight):
        return device_parameter(value, dtype)
    tensors = portable_tensors(value) if kernels is None else kernels.quantised_tensors(value)
    if value.order is not None:
        tensors += (Tensor.from_numpy(value.order),)
    if on_cpu():
        # A Parameter shares the memory of a Tensor that nobody else refers to; arguments by their names count.
        return tuple(Parameter(Tensor.from_numpy(in_large_pages(tensor.asnumpy())), None, False) for tensor in tensors)
    return tuple(move_to_device(Parameter(tensor, requires_grad=False)) for tensor in tensors)


def portable_tensors(weight):
    """A `QuantisedWeight`'s values and scales as this module's docstring has them, on the host."""
    return Tensor.from_numpy(weight.packed()), Tensor.from_numpy(np.ascontiguousarray(weight.scales, np.float32))


def is_portable(weight):
    """Whether a product's tuple is as this module's docstring has it; operations of a device have scales in their dtype."""
    return weight[1].dtype == ms.float32


def as_arguments(weight):
    """A weight's data as compiled graphs take it that serve all layers; a tuple that is not mutable would be a constant."""
    return ms.mutable(_data(weight)) if isinstance(weight, tuple) else _data(weight)


def _data(weight):
    """Of a Parameter, of each in a tuple, in which a quantised weight with an adapter is a tuple itself, or of None."""
    if isinstance(weight, tuple):
        return tuple(map(_data, weight))
    return None if weight is None else weight.data


def dequantise(weight, inputs):
    """The float32 weight (out, in) of a product's tuple, its columns as they are packed; for graphs, on any device."""
    packed, scales = weight[0], weight[1]
    outputs, groups = scales.shape
    if packed.dtype == ms.int8:
        values = packed.astype(ms.float32)
    else:
        # By arithmetic: not every device shifts bytes. Byte b of a word holds its values 2b and 2b + 1.
        both = packed.astype(ms.float32).reshape(outputs, -1, WORDS, NIBBLES // 2)
        high = ops.floor(both * (1 / 16))
        pairs = ops.stack((both - high * 16.0, high), -1).transpose(0, 1, 3, 4, 2)
        values = pairs.reshape(outputs, -1)[:, :inputs] - 8.0
    return (values.reshape(outputs, groups, -1) * scales.reshape(outputs, groups, 1)).reshape(outputs, inputs)


def in_order(x, weight):
    """x (N, in) with its columns in the order of the weight's."""
    return ops.gather(x, weight[2], 1) if len(weight) == 3 else x
