"""A block's first half over long sequences: attention by blocks of queries, what lies before and behind it in graphs.

`AttentionByBlocks` takes the place of `Attention` (block_graphs.py) and `PrefillAttentionByBlocks` that of
`PrefillAttention` (generation/graphs.py) where `Kernels.attention_tensors` gives `BlockMasks`.
"""

import mindspore as ms
from mindspore import nn, ops

from telechat.nn.block_graphs import gradient, place_after, with_bias
from telechat.nn.lora import trained


class AttentionByBlocks(nn.Cell):
    """The first half of a block in training; arguments and results as of `Attention`."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions
        self.project = Project(functions)

    def construct(self, x, cos, sin, masks, position_bias, segment_ids, drop_attention, drop_dense,
                  norm, query, key_value, dense, dense_bias, *lora):
        """masks: `BlockMasks`; drop_attention: `BlockMasks` or None; position_bias, segment_ids: None."""
        f = self.functions
        of_qkv, of_dense = f.cut_attention(lora)
        q, k, v = self.project(x, cos, sin, norm, query, key_value, *of_qkv)
        result = f.kernels.blockwise_attention(q, k, v, masks, f.scale, drop_attention)
        middle, attended = self.finish(x, result, drop_dense, dense, dense_bias, *of_dense)
        return middle, q, k, v, None, attended

    def backward(self, dmiddle, x, q, k, v, log_sums, attended, cos, sin, masks, position_bias, segment_ids, drop_attention,
                 drop_dense, norm, query, key_value, dense, dense_bias, *lora):
        """As `Attention.backward`; log_sums: None."""
        f = self.functions
        of_qkv, of_dense = f.cut_attention(lora)
        dresult, dx, *outer = self.behind(cos.shape[2], dmiddle, x, attended, drop_dense, dense, dense_bias, *of_dense)
        dheads = f.kernels.blockwise_attention.backward(dresult, q, k, v, masks, f.scale, drop_attention)
        return *self.before(dx, x, cos, sin, norm, query, key_value, *dheads, *of_qkv), *outer

    @ms.jit
    def finish(self, x, result, drop_dense, dense, dense_bias, *lora):
        """From attention's result to the half's; and the former with its heads merged."""
        f = self.functions
        attended = f.kernels.merge_heads(result)
        return f.project_attention(x, attended, dense, dense_bias, drop_dense, *lora), attended

    @ms.jit
    def behind(self, length, dmiddle, x, attended, drop_dense, dense, dense_bias, *lora):
        """The gradients of attention's result, of the residual and of the weights behind, or of an adapter's tensors."""
        f = self.functions
        grads = gradient(f.project_attention)(x, attended, dense, dense_bias, drop_dense, *lora, dmiddle)
        if f.lora is not None:
            return (f.kernels.split_heads(grads[1], length, f.head_dim), grads[0],
                    *trained(grads, place_after(3, dense_bias, drop_dense), lora))
        return (f.kernels.split_heads(grads[1], length, f.head_dim), grads[0], grads[2],
                *with_bias(grads, dense_bias, 3))

    @ms.jit
    def before(self, dx, x, cos, sin, norm, query, key_value, dquery, dkey, dvalue, *lora):
        """The gradients of the half's input and of the weights before attention, or of an adapter's tensors."""
        f = self.functions
        grads = gradient(f.project_qkv)(x, norm, query, key_value, *lora, f.heads_backward(dquery, dkey, dvalue, cos, sin))
        if f.lora is not None:
            return dx + grads[0], *trained(grads, 4, lora)
        return dx + grads[0], grads[1], grads[2], grads[3]


class Project(nn.Cell):
    """x (B·S, H) → queries, keys and values as `BlockFunctions.heads` gives them."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    @ms.jit
    def construct(self, x, cos, sin, norm, query, key_value, *lora):
        f = self.functions
        return f.heads(*f.project_qkv(x, norm, query, key_value, *lora), cos, sin)


class PrefillAttentionByBlocks(nn.Cell):
    """A block's first half over a whole prompt; writes its keys and values into the cache. As `PrefillAttention`."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions
        self.project = Project(functions)

    def construct(self, x, cos, sin, masks, position_bias, segment_ids, index, key_cache, value_cache,
                  norm, query, key_value, dense, dense_bias):
        f = self.functions
        q, k, v = self.project(x, cos, sin, norm, query, key_value)
        result = f.kernels.blockwise_attention(q, k, v, masks, f.scale)
        return self.finish(x, result, k, v, index, key_cache, value_cache, dense, dense_bias)

    @ms.jit
    def finish(self, x, result, key, value, index, key_cache, value_cache, dense, dense_bias):
        """From attention's result to the half's, when keys and values are in the cache."""
        f = self.functions
        written = f.kernels.write_cache(key_cache, value_cache, key, value, index)
        return ops.depend(f.project_attention(x, f.kernels.merge_heads(result), dense, dense_bias), written)
