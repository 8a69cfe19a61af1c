"""The kernels of a card: fused Ascend operations where there is one; `telechat.nn.kernels` says what each computes."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from telechat.errors import InputError
from telechat.nn import ascend_kernels as ascend
from telechat.nn import cached_attention as cached
from telechat.nn import portable_kernels as portable
from telechat.nn import quantised_matmul
from telechat.nn.device import device_tensor, on_cpu
from telechat.nn.flash_tensors import flash_tensors
from telechat.nn.kernels import Kernels
from telechat.nn.log import log_once
from telechat.nn.quantised import dequantise, in_order, is_portable


class AscendKernels(Kernels):
    """`Kernels` of a card; what has no fused operation, or may not have it, is portable.

    Args:
        dtype: of the activations.
        flash (bool): attention over whole sequences by FlashAttentionScore; heads lie as (B, S, heads, D) then.
        paged (bool): decoding by ReshapeAndCache and PagedAttention.
        keep_prob (float): 1 − the rate of attention dropout.
        quantised (bool): products with quantised weights by WeightQuantBatchMatmul, which has no gradient.
    """

    fused = True
    in_graphs = False

    def __init__(self, dtype, flash=True, paged=False, keep_prob=1.0, quantised=False):
        super().__init__(dtype, keep_prob)
        self.flash = flash
        self.paged = paged
        self.quantised = quantised
        self.for_cpu = False
        self.rows_at_once = None  # the fused operations are best left whole

    def describe(self):
        attention = "FlashAttentionScore" if self.flash else "portable"
        return f"attention {attention}, decoding {'PagedAttention' if self.paged else 'portable'}, all else fused Ascend operations"

    def require_device(self):
        if on_cpu():
            raise InputError('kernels "ascend" cannot run on a CPU; set kernels to "portable" or leave it out')

    def linear(self, x, weight, bias=None):
        return self.quantised_linear(x, weight, bias) if isinstance(weight, tuple) else ascend.linear(x, weight, bias)

    def quantised_tensors(self, weight):
        if self.quantised:
            obstacle = quantised_matmul.obstacle(weight, self.dtype)
            if obstacle is None:
                return quantised_matmul.tensors(weight, self.dtype)
            log_once(f"quantised weights are dequantised for each product: {obstacle}")
        return super().quantised_tensors(weight)

    def quantised_linear(self, x, weight, bias=None):
        x = in_order(x, weight)
        if is_portable(weight):
            return self.linear(x, dequantise(weight, x.shape[1]), bias)
        return self.add_bias(quantised_matmul.quantised_matmul(x, weight[0], weight[1]), bias)

    def add_bias(self, x, bias):
        return x if bias is None else x + bias.astype(x.dtype)  # an operation of the new kind, as its gradient is

    def rms_norm(self, x, weight, epsilon):
        return ascend.rms_norm(x, weight, epsilon)

    def add_rms_norm(self, x, delta, weight, epsilon):
        return ascend.add_rms_norm(x, delta, weight, epsilon)

    def swiglu(self, gate, up):
        return ascend.swiglu(gate, up)

    def rotary_tensor(self, table):
        # The fused operation takes all in one dtype, so the table is rounded to it, once for all layers.
        return device_tensor(table, self.dtype)

    def rotate(self, x, cos, sin):
        if not self.flash:  # with (B, heads, S, D) CANN's operation takes no more heads than 8·S / B, and not every D
            return portable.rotate(x, cos, sin)
        shape = (cos.shape[0], cos.shape[2], 1, cos.shape[3])
        return ascend.rotate(x, cos.reshape(shape), sin.reshape(shape))

    def split_heads(self, x, length, dim):
        x = x.reshape(-1, length, x.shape[-1] // dim, dim)
        return x if self.flash else x.transpose(0, 2, 1, 3)

    def merge_heads(self, x):
        x = x if self.flash else x.transpose(0, 2, 1, 3)
        return x.reshape(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3])

    def split_key_value(self, x, length, dim):
        return ops.Split(-1, 2)(self.split_heads(x, length, 2 * dim))

    def merge_key_value(self, key, value):
        return self.merge_heads(ops.concat((key, value), -1))

    def attention_tensors(self, config, length, padding=None, segment_ids=None, heads=slice(None), dropout=False):
        if self.flash and not (dropout and length % 8):
            return flash_tensors(config, length, self.dtype, padding, segment_ids, heads, dropout)
        if self.flash:
            log_once("attention by portable operations: with dropout flash attention takes lengths of a multiple of 8")
        return super().attention_tensors(config, length, padding, segment_ids, heads, dropout)

    def goes_by_blocks(self, length, dropout=False):
        """Not with the masks that a card's own generator makes whole."""
        return not self.flash and not dropout and super().goes_by_blocks(length)

    def attention_dropout(self, length, rate, place, heads):
        if rate == 0:
            return None
        if self.flash and length % 8 == 0:
            bits = ascend.dropout_bits(length, length, rate, place.keys(heads), self.dtype)
            return bits.reshape(-1, len(heads), length, length // 8)
        masks = ascend.dropout_mask(length, length, rate, place.keys(heads), ms.float32)
        return masks.reshape(-1, len(heads), length, length)

    def output_dropout(self, length, width, rate, place, stream):
        if rate == 0:
            return None
        return ascend.dropout_mask(length, width, rate, place.keys([stream]), self.dtype).reshape(-1, width)

    def attention(self, query, key, value, mask, position_bias, segment_ids, scale, dropout=None):
        if not isinstance(mask, Tensor):
            return self.blockwise_attention(query, key, value, mask, scale, dropout)
        if not self.flash:
            return portable.attention(query, key, value, mask, scale, dropout)
        if mask.dtype != ms.float32:
            return ascend.attention(query, key, value, mask, position_bias, segment_ids, scale, dropout, self.keep_prob)
        query, key, value = query.transpose(0, 2, 1, 3), key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
        return portable.attention(query, key, value, mask, scale, dropout).transpose(0, 2, 1, 3)

    def token_cross_entropy(self, logits, labels, weights):
        return ascend.token_cross_entropy(logits, labels, weights)

    def adamw_scalars(self, updates, rate, betas, epsilon, decay):
        return ascend.adamw_scalars(updates, rate, betas, epsilon, decay)

    def adamw(self, parameter, first_moment, second_moment, gradient, clip, step, rate, beta1, beta2, epsilon, decay,
              copy=None):
        if clip is not None:
            gradient = gradient * clip  # one launch: float32 since clip is, and no tensor of no dimensions
        return ascend.adamw(parameter, first_moment, second_moment, gradient, step, rate, beta1, beta2, epsilon, decay)

    def sums_of_squares(self, *tensors):
        return ascend.sums_of_squares(tensors)

    def cache_shape(self, blocks, size, heads, dim):
        return (blocks, size, heads, dim) if self.paged else (blocks, heads, size, dim)

    def cache_view(self, cache):
        return cache if self.paged else cache.view(-1, cache.shape[-1])

    def cache_index(self, places, heads, size):
        return Tensor(places.reshape(-1).astype(np.int32)) if self.paged else super().cache_index(places, heads, size)

    def write_cache(self, key_cache, value_cache, key, value, index):
        if self.paged:
            return ascend.write_cache(key_cache, value_cache, self.merge_heads(key), self.merge_heads(value), index)
        if self.flash:  # heads lie as (B, S, m, D), rows of the cache by head
            key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
        return cached.write_cache(key_cache, value_cache, key, value, index)

    def chunk_tensors(self, config, positions, length, heads=slice(None)):
        """With flash attention uint8 (B, 1, S, T), 1 hides, and ALiBi's bias."""
        if not self.flash:
            return super().chunk_tensors(config, positions, length, heads)
        bias = np.maximum(cached.chunk_mask(config, positions, length, heads), -1e4)
        position_bias = device_tensor(bias, self.dtype) if config.position_embedding == "alibi" else None
        return device_tensor((positions[:, None, :, None] < np.arange(length)).astype(np.uint8)), position_bias

    def attention_over_cache(self, query, keys, values, written, table, mask, position_bias, scale):
        keys, values = self.read_cache(keys, written, table), self.read_cache(values, written, table)
        if self.flash:
            return ascend.attention(query, keys, values, mask, position_bias, None, scale, None, 1.0)
        return portable.attention(query, keys, values, mask, scale)

    def read_cache(self, cache, written, table):
        """With flash attention (B, T, m, D)."""
        cache = ops.depend(cache, written)
        if not self.paged:
            heads = cached.read_cache(cache, table)
            return heads.transpose(0, 2, 1, 3) if self.flash else heads
        heads = ops.gather(cache, table, 0).reshape(table.shape[0], -1, *cache.shape[2:])
        return heads if self.flash else heads.transpose(0, 2, 1, 3)

    def decoding_places(self, positions, index, table, lengths, slopes, size):
        if self.paged:
            return index, table, lengths
        return cached.decoding_places(positions, index, table, slopes, size)

    def cached_attention(self, query, key_value, rotation, caches, places, scale):
        attend = ascend.cached_attention if self.paged else cached.cached_attention
        return attend(query, key_value, rotation, caches, places, scale)
