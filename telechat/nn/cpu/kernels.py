"""The kernels of a model on a CPU that has a C++ compiler: operators of our own in the place of MindSpore's."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from telechat.nn import cached_attention as cached
from telechat.nn import portable_kernels as portable
from telechat.nn.alibi import alibi_slopes
from telechat.nn.cpu.build import default_threads, load_library
from telechat.nn.cpu.decoding import DecodeStep, shared_bytes
from telechat.nn.cpu.operators import NOTHING, Operators, dropout_masks, run_now
from telechat.nn.dropout import threshold
from telechat.nn.kernels import Kernels
from telechat.nn.quantised import in_order


class CpuKernels(Kernels):
    """`Kernels` by the operators in this folder; what has none is portable.

    Activations are float32, heads lie as (B, S, heads, D). Norms of gradients and updates are computed at once.

    Args:
        keep_prob (float): 1 − the rate of attention dropout.
        weights: dtype of the weights.
        rounded (bool): factors of products are rounded to bfloat16 where the machine multiplies these; sums are
            float32. Else bfloat16 weights are multiplied as the float32 numbers they are.
    """

    in_graphs = False
    copied_dtype = ms.bfloat16
    has_head_loss = True

    def __init__(self, keep_prob=1.0, weights=ms.float32, rounded=False):
        super().__init__(ms.float32, keep_prob)
        self.trains = False
        self.weights = weights
        self.operators = Operators(rounded)

    def for_training(self):
        kernels = CpuKernels(self.keep_prob, self.weights, rounded=self.weights == ms.bfloat16)
        kernels.trains = True
        return kernels

    def describe(self):
        able = load_library().multiplies_bfloat16()
        return (f"operators for CPUs, {default_threads()} threads; products in training "
                + ("bfloat16" if able and self.weights == ms.bfloat16 else "float32")
                + ("" if able else " (this CPU multiplies no bfloat16)"))

    def embedding(self, input_ids, weight, dtype):
        return self.operators.embedding(input_ids, weight)

    def embedding_gradient(self, dx, input_ids, weight):
        return self.operators.embedding_gradient(dx, input_ids, weight)

    def linear(self, x, weight, bias=None):
        if isinstance(weight, tuple):
            return self.quantised_linear(x, weight, bias)
        return self.operators.linear(x, weight, bias)

    def linear_pair(self, x, first, second):
        if isinstance(first, tuple) or isinstance(second, tuple):
            return super().linear_pair(x, first, second)
        return self.operators.linear_pair(x, first, second)

    def adapted_linear(self, x, weight, bias, a, b, scale, mask=None):
        if isinstance(weight, tuple):
            if len(weight) == 3:  # x lies in another order for the weight than for the adapter
                return super().adapted_linear(x, weight, bias, a, b, scale, mask)
            weight = self.operators.dequantise(weight[0], weight[1], ops.stop_gradient(x))
        return self.operators.adapted_linear(x, weight, bias, a, b, mask, Tensor(scale, ms.float32))

    def quantised_linear(self, x, weight, bias=None):
        if self.trains:  # the operator has no gradient
            x = in_order(x, weight)
            return self.linear(x, self.operators.dequantise(weight[0], weight[1], ops.stop_gradient(x)), bias)
        order = weight[2] if len(weight) == 3 else NOTHING
        return self.operators.quantised_linear(x, weight[0], weight[1], order, NOTHING if bias is None else bias)

    def rms_norm(self, x, weight, epsilon):
        return self.operators.rms_norm(x, weight, Tensor(epsilon, ms.float32))

    def swiglu(self, gate, up):
        return self.operators.swiglu(gate, up)

    def rotate(self, x, cos, sin):
        return self.operators.rotate(x, cos, sin)

    def split_heads(self, x, length, dim):
        return x.reshape(-1, length, x.shape[-1] // dim, dim)

    def split_key_value(self, x, length, dim):
        return ops.split(self.split_heads(x, length, 2 * dim), dim, 3)

    def merge_key_value(self, key, value):
        return self.merge_heads(ops.concat((key, value), 3))

    def merge_heads(self, x):
        return x.reshape(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3])

    def attention_tensors(self, config, length, padding=None, segment_ids=None, heads=slice(None), dropout=False):
        """(segments, slopes, None): int32 (B, S) and float32 (n,) as `operators.Attend` takes them, or None."""
        segments = slopes = None
        if padding is not None or segment_ids is not None:
            some = padding if segment_ids is None else segment_ids
            segments = np.zeros(np.shape(some), np.int32) if segment_ids is None else np.asarray(segment_ids, np.int32)
            if padding is not None:
                # A pad is a segment of its own, which nothing else sees.
                segments = np.where(np.asarray(padding) != 0, segments, -2 ** 31 + np.arange(length, dtype=np.int32))
            segments = Tensor(segments.astype(np.int32))
        if config.position_embedding == "alibi":
            slopes = Tensor(alibi_slopes(config.n_head)[heads])
        return segments, slopes, None

    def attention_dropout(self, length, rate, place, heads):
        """What the operator makes masks from, int32 (B, n, 6): sequence, layer and head, step, the key, T."""
        return None if rate == 0 else Tensor(descriptions(rate, place, heads).reshape(-1, len(heads), 6))

    def output_dropout(self, length, width, rate, place, stream):
        if rate == 0:
            return None
        return Tensor(dropout_masks(descriptions(rate, place, [stream]), length, width).reshape(-1, width))

    def attention(self, query, key, value, mask, position_bias, segment_ids, scale, dropout=None):
        attended, _ = self.operators.attend(query, key, value, mask, position_bias, dropout, Tensor(scale, ms.float32))
        return attended.reshape(query.shape)

    def attention_in_training(self, query, key, value, mask, position_bias, segment_ids, scale, dropout=None):
        """`attention` with its heads merged, and each row's logarithm of its sum, float32 (B, n, S)."""
        return self.operators.attend(query, key, value, mask, position_bias, dropout, Tensor(scale, ms.float32))

    def attention_backward(self, dattended, attended, query, key, value, log_sums, mask, position_bias, segment_ids, scale,
                           dropout=None):
        return self.operators.attend.backward(dattended, attended, query, key, value, log_sums, mask, position_bias,
                                              dropout, Tensor(scale, ms.float32))

    # A model over a cache goes through `decode_step`, but for one that is cut over several hosts.

    def write_cache(self, key_cache, value_cache, key, value, index):
        return cached.write_cache(key_cache, value_cache, key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3), index)

    def attention_over_cache(self, query, keys, values, written, table, mask, position_bias, scale):
        keys, values = self.read_cache(keys, written, table), self.read_cache(values, written, table)
        return portable.attention(query.transpose(0, 2, 1, 3), keys, values, mask, scale).transpose(0, 2, 1, 3)

    def decode_step(self, config, slopes, shared=None):
        return DecodeStep(config, slopes, shared)

    def shared_bytes(self, processes):
        return shared_bytes(processes)

    def token_cross_entropy(self, logits, labels, weights):
        return self.operators.cross_entropy(logits, labels, weights)

    def head_loss(self, x, head, labels, weights, scale, frozen=False):
        operators = self.operators
        operator = operators.frozen_head_loss if frozen else operators.head_loss
        return operator(x, head, labels, weights, Tensor(scale, ms.float32), operators.linear.rounded)

    def adamw(self, parameter, first_moment, second_moment, gradient, clip, step, rate, beta1, beta2, epsilon, decay,
              copy=None):
        gradient = gradient if gradient.dtype == ms.float32 else gradient.astype(ms.float32)
        run_now("adamw", parameter, first_moment, second_moment, gradient, clip, rate, beta1, beta2, epsilon, decay,
                NOTHING if copy is None else copy)
        return clip

    def copy_rounded(self, target, source):
        if target.dtype == ms.bfloat16:
            run_now("round_to_bfloat16", source, target)
        else:
            super().copy_rounded(target, source)

    def sums_of_squares(self, *tensors):
        sums = Tensor(np.zeros(len(tensors), np.float32))
        run_now("sums_of_squares", *[tensor if tensor.dtype == ms.float32 else tensor.astype(ms.float32)
                                     for tensor in tensors], sums)
        return sums


def descriptions(rate, place, streams):
    """What operators make dropout masks from, int32 (sequences · streams, 6): three words of the counter, the key, T."""
    words = [(*counter, *place.key, threshold(rate)) for counter in place.counters(streams)]
    return np.array(words, np.uint32).view(np.int32)
