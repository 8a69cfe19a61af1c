"""A block over long sequences: attention goes in pieces, what lies before and behind it in compiled graphs.

`LongAttention` takes the place of `Attention` (block_graphs.py) and `LongPrefillAttention` that of
`PrefillAttention` (generation/engine.py) where `Kernels.attention_tensors` gives `Pieces`. Lists of pieces are
handed to the graphs as separate arguments: a list would be a constant, and compile anew at every call.
"""

import mindspore as ms
from mindspore import nn, ops

from telechat.nn.block_graphs import gradient, with_bias
from telechat.nn.portable_gradients import sums_by_head


class LongAttention(nn.Cell):
    """The first half of a block in training, as `Attention` (block_graphs.py), in pieces."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions
        self.projected = Projected(functions)

    def construct(self, x, cos, sin, pieces, shift, documents, drop_attention, drop_dense,
                  norm, query, key_value, dense, dense_bias):
        """As `Attention`; pieces: `Pieces` in the place of a mask; shift, documents, drop_attention: None."""
        parts = self.projected(pieces, x, cos, sin, norm, query, key_value)
        results, normalisers = self.functions.kernels.in_pieces.attend(*parts, pieces)
        middle, attended = self.finish(x, drop_dense, dense, dense_bias, *results)
        return middle, *parts, normalisers, attended

    def backward(self, dmiddle, x, queries, keys, values, normalisers, attended, cos, sin, pieces, shift, documents,
                 drop_attention, drop_dense, norm, query, key_value, dense, dense_bias):
        """As `Attention.backward`."""
        count = len(pieces)
        parts = self.behind(cos.shape[2], pieces.size, dmiddle, x, attended, drop_dense, dense, dense_bias)
        dresults, inners, (dx, *outer) = parts[:count], parts[count:2 * count], parts[2 * count:]
        dqueries, dkeys, dvalues = self.functions.kernels.in_pieces.attend_backward(
            queries, keys, values, normalisers, dresults, inners, pieces)
        return *self.before(dx, x, cos, sin, norm, query, key_value, *dqueries, *dkeys, *dvalues), *outer

    @ms.jit
    def finish(self, x, drop_dense, dense, dense_bias, *results):
        """From attention's result, in pieces, to the half's; and the former in one."""
        f = self.functions
        attended = f.kernels.merge_heads(ops.concat(results, 2))
        return f.kernels.by_workers(f.project_attention(x, attended, dense, dense_bias, drop_dense)), attended

    @ms.jit
    def behind(self, length, size, dmiddle, x, attended, drop_dense, dense, dense_bias):
        """Back to attention's result: its gradient and −Σ gradient·result in pieces, the residual's, the weights'."""
        f = self.functions
        dense_grads = gradient(f.project_attention)(x, attended, dense, dense_bias, drop_dense, dmiddle)
        dattended = dense_grads[1]
        inner = sums_by_head(dattended * attended, length, f.head_dim) * -1.0
        return (*ops.split(f.kernels.split_heads(dattended, length, f.head_dim), size, 2), *ops.split(inner, size, 2),
                f.kernels.by_workers(dense_grads[0]), dense_grads[2], *with_bias(dense_grads, dense_bias, 3))

    @ms.jit
    def before(self, dx, x, cos, sin, norm, query, key_value, *dpieces):
        """From the gradients of the pieces back to the block's input and the first weights."""
        f = self.functions
        count = len(dpieces) // 3
        dquery = ops.concat(dpieces[:count], 2) * f.scale
        dkey, dvalue = ops.concat(dpieces[count:2 * count], 2), ops.concat(dpieces[2 * count:], 2)
        grads = gradient(f.project_qkv)(x, norm, query, key_value, f.heads_backward(dquery, dkey, dvalue, cos, sin))
        return f.kernels.by_workers(dx + grads[0]), grads[1], grads[2], grads[3]


class Projected(nn.Cell):
    """Queries, multiplied by the scale, keys and values of a block, in pieces."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def construct(self, pieces, x, cos, sin, norm, query, key_value):
        """x (B·S, H) → the pieces of queries, of keys and of values, as `PieceAttention.attend` takes them."""
        parts = self.split(pieces.size, x, cos, sin, norm, query, key_value)
        return parts[:len(pieces)], parts[len(pieces):-len(pieces)], parts[-len(pieces):]

    @ms.jit
    def split(self, size, x, cos, sin, norm, query, key_value):
        """All pieces one behind the other."""
        f = self.functions
        query, key, value = f.heads(*f.project_qkv(x, norm, query, key_value), cos, sin)
        query = f.kernels.by_workers(query * f.scale)
        return (*ops.split(query, size, 2), *ops.split(key, size, 2), *ops.split(value, size, 2))


class LongPrefillAttention(nn.Cell):
    """A block's first half over a whole prompt; writes its keys and values into the cache. As `PrefillAttention`."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions
        self.projected = Projected(functions)

    def construct(self, x, cos, sin, pieces, shift, documents, index, key_cache, value_cache,
                  norm, query, key_value, dense, dense_bias):
        queries, keys, values = self.projected(pieces, x, cos, sin, norm, query, key_value)
        results, _ = self.functions.kernels.in_pieces.attend(queries, keys, values, pieces)
        return self.finish(x, index, key_cache, value_cache, len(pieces), dense, dense_bias, *results, *keys, *values)

    @ms.jit
    def finish(self, x, index, key_cache, value_cache, count, dense, dense_bias, *parts):
        f = self.functions
        results, keys = ops.concat(parts[:count], 2), ops.concat(parts[count:2 * count], 2)
        values = ops.concat(parts[2 * count:], 2)
        written = f.kernels.write_cache(key_cache, value_cache, keys, values, index)
        middle = f.project_attention(x, f.kernels.merge_heads(results), dense, dense_bias)
        return f.kernels.by_workers(ops.depend(middle, written))
