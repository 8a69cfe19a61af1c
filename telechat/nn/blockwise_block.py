"""A block's first half over long sequences: attention by blocks of queries, what lies before and behind it in graphs.

`AttentionByBlocks` takes the place of `Attention` (block_graphs.py) and `PrefillAttentionByBlocks` that of
`PrefillAttention` (generation/graphs.py) where `Kernels.attention_tensors` gives `BlockMasks`.
"""

import mindspore as ms
from mindspore import nn, ops

from telechat.nn.block_graphs import gradient, with_bias


class AttentionByBlocks(nn.Cell):
    """The first half of a block in training; arguments and results as of `Attention`."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions
        self.project = Project(functions)

    def construct(self, x, cos, sin, masks, shift, documents, drop_attention, drop_dense,
                  norm, query, key_value, dense, dense_bias):
        """masks: `BlockMasks`; drop_attention: `BlockMasks` or None; shift, documents: None."""
        f = self.functions
        q, k, v = self.project(x, cos, sin, norm, query, key_value)
        result = f.kernels.blockwise_attention(q, k, v, masks, f.scale, drop_attention)
        middle, attended = self.finish(x, result, drop_dense, dense, dense_bias)
        return middle, q, k, v, None, attended

    def backward(self, dmiddle, x, q, k, v, log_sums, attended, cos, sin, masks, shift, documents, drop_attention,
                 drop_dense, norm, query, key_value, dense, dense_bias):
        f = self.functions
        dresult, dx, *outer = self.behind(cos.shape[2], dmiddle, x, attended, drop_dense, dense, dense_bias)
        dheads = f.kernels.blockwise_attention.backward(dresult, q, k, v, masks, f.scale, drop_attention)
        return *self.before(dx, x, cos, sin, norm, query, key_value, *dheads), *outer

    @ms.jit
    def finish(self, x, result, drop_dense, dense, dense_bias):
        """From attention's result to the half's; and the former with its heads merged."""
        f = self.functions
        attended = f.kernels.merge_heads(result)
        return f.project_attention(x, attended, dense, dense_bias, drop_dense), attended

    @ms.jit
    def behind(self, length, dmiddle, x, attended, drop_dense, dense, dense_bias):
        """The gradients of attention's result, of the residual and of the weights behind."""
        f = self.functions
        grads = gradient(f.project_attention)(x, attended, dense, dense_bias, drop_dense, dmiddle)
        return (f.kernels.split_heads(grads[1], length, f.head_dim), grads[0], grads[2],
                *with_bias(grads, dense_bias, 3))

    @ms.jit
    def before(self, dx, x, cos, sin, norm, query, key_value, dquery, dkey, dvalue):
        """The gradients of the half's input and of the weights before attention."""
        f = self.functions
        grads = gradient(f.project_qkv)(x, norm, query, key_value, f.heads_backward(dquery, dkey, dvalue, cos, sin))
        return dx + grads[0], grads[1], grads[2], grads[3]


class Project(nn.Cell):
    """x (B·S, H) → queries, keys and values as `BlockFunctions.heads` gives them."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    @ms.jit
    def construct(self, x, cos, sin, norm, query, key_value):
        f = self.functions
        return f.heads(*f.project_qkv(x, norm, query, key_value), cos, sin)


class PrefillAttentionByBlocks(nn.Cell):
    """A block's first half over a whole prompt; writes its keys and values into the cache. As `PrefillAttention`."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions
        self.project = Project(functions)

    def construct(self, x, cos, sin, masks, shift, documents, index, key_cache, value_cache,
                  norm, query, key_value, dense, dense_bias):
        f = self.functions
        q, k, v = self.project(x, cos, sin, norm, query, key_value)
        result = f.kernels.blockwise_attention(q, k, v, masks, f.scale)
        return self.finish(x, result, k, v, index, key_cache, value_cache, dense, dense_bias)

    @ms.jit
    def finish(self, x, result, key, value, index, key_cache, value_cache, dense, dense_bias):
        f = self.functions
        written = f.kernels.write_cache(key_cache, value_cache, key, value, index)
        return ops.depend(f.project_attention(x, f.kernels.merge_heads(result), dense, dense_bias), written)
