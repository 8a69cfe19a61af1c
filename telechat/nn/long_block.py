"""A block over long sequences: attention goes in pieces, what lies before and behind it in compiled graphs.

`LongBlockForward` and `LongBlockBackward` take the places of `BlockForward` and `BlockBackward` (graphs.py)
where `goes_in_pieces` says so, `LongPrefillBlock` that of `PrefillBlock`. Lists of pieces are handed to the
graphs as separate arguments: a list would be a constant, and compile anew at every call.
"""

import mindspore as ms
from mindspore import nn, ops

from telechat.nn.long_attention import attend, attend_backward

_gradient = ops.GradOperation(get_all=True, sens_param=True)


class LongBlock(nn.Cell):
    """What the forward passes share: the graphs around attention."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def attend(self, x, cos, sin, pieces, weights):
        """x (B·S, H) → queries, keys and values, the result, and the normalisers of `attend`, in pieces each."""
        parts = self.project(pieces.size, x, cos, sin, *weights[:3])
        queries, keys, values = parts[:len(pieces)], parts[len(pieces):-len(pieces)], parts[-len(pieces):]
        return queries, keys, values, *attend(queries, keys, values, pieces)

    @ms.jit
    def project(self, size, x, cos, sin, norm, query, key_value):
        """The pieces of queries, multiplied by the scale, then those of keys, then of values."""
        f = self.functions
        query, key, value = f.heads(*f.project_qkv(x, norm, query, key_value), cos, sin)
        query = f.kernels.by_workers(query * f.scale)
        return (*ops.split(query, size, 2), *ops.split(key, size, 2), *ops.split(value, size, 2))


class LongBlockForward(LongBlock):
    """A block's forward pass; returns its output and what `LongBlockBackward` starts from."""

    def construct(self, x, cos, sin, pieces, shift, documents, drop_attention, drop_dense, drop_down, *weights):
        """As `BlockForward`; pieces: `Pieces` in the place of a mask; shift, documents, drop_attention: None."""
        *parts, results, normalisers = self.attend(x, cos, sin, pieces, weights)
        y, *kept = self.finish(x, drop_dense, drop_down, *weights[3:], *results)
        return y, *parts, normalisers, *kept

    @ms.jit
    def finish(self, x, drop_dense, drop_down, dense, dense_bias, norm, gate, up, down, down_bias, *results):
        """From attention's result, in pieces, to the block's output; that and the inputs of the products."""
        f = self.functions
        attended = f.kernels.merge_heads(ops.concat(results, 2))
        middle = f.project_attention(x, attended, dense, dense_bias, drop_dense)
        g, u = f.project_gate_up(middle, norm, gate, up)
        return f.kernels.by_workers(f.project_down(middle, g, u, down, down_bias, drop_down)), attended, middle, g, u


class LongBlockBackward(nn.Cell):
    """A block's backward pass, from its output's gradient to its input's and its weights', as `BlockBackward`."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def construct(self, dy, x, queries, keys, values, normalisers, attended, middle, g, u, cos, sin, pieces, shift,
                  documents, drop_attention, drop_dense, drop_down, *weights):
        norm, query, key_value, *others = weights
        count = len(pieces)
        length = cos.shape[2]
        dmiddle, *outer = self.feed_forward(dy, middle, g, u, drop_down, *others[2:])
        parts = self.behind(length, pieces.size, dmiddle, x, attended, drop_dense, *others[:2])
        dresults, inners, (dx, *dense) = parts[:count], parts[count:2 * count], parts[2 * count:]
        dqueries, dkeys, dvalues = attend_backward(queries, keys, values, normalisers, dresults, inners, pieces)
        dx, *inner = self.before(dx, x, cos, sin, norm, query, key_value, *dqueries, *dkeys, *dvalues)
        return dx, *inner, *dense, *outer

    @ms.jit
    def feed_forward(self, dy, middle, g, u, drop_down, norm, gate, up, down, down_bias):
        """Back to the feed-forward layer's input: its gradient and the weights'."""
        f = self.functions
        down_grads = _gradient(f.project_down)(middle, g, u, down, down_bias, drop_down, dy)
        gate_grads = _gradient(f.project_gate_up)(middle, norm, gate, up, (down_grads[1], down_grads[2]))
        # None arguments have no gradient, so a bias gradient is there only where a bias is.
        down_bias_grad = () if down_bias is None else (down_grads[4],)
        return (f.kernels.by_workers(down_grads[0] + gate_grads[0]), gate_grads[1], gate_grads[2], gate_grads[3], down_grads[3],
                *down_bias_grad)

    @ms.jit
    def behind(self, length, size, dmiddle, x, attended, drop_dense, dense, dense_bias):
        """Back to attention's result: its gradient and −Σ gradient·result in pieces, the residual's, the weights'."""
        f = self.functions
        dense_grads = _gradient(f.project_attention)(x, attended, dense, dense_bias, drop_dense, dmiddle)
        dattended = dense_grads[1]
        ones = ops.ones((f.head_dim, 1), ms.float32)
        inner = ops.MatMul()((dattended * attended).reshape(-1, f.head_dim), ones * -1.0)
        inner = f.kernels.split_heads(inner.reshape(dattended.shape[0], -1), length, 1)
        dense_bias_grad = () if dense_bias is None else (dense_grads[3],)
        return (*ops.split(f.kernels.split_heads(dattended, length, f.head_dim), size, 2), *ops.split(inner, size, 2),
                f.kernels.by_workers(dense_grads[0]), dense_grads[2], *dense_bias_grad)

    @ms.jit
    def before(self, dx, x, cos, sin, norm, query, key_value, *dpieces):
        """From the gradients of the pieces back to the block's input and the first weights."""
        f = self.functions
        count = len(dpieces) // 3
        dquery = ops.concat(dpieces[:count], 2) * f.scale
        dkey, dvalue = ops.concat(dpieces[count:2 * count], 2), ops.concat(dpieces[2 * count:], 2)
        if f.rotary:
            # The transpose of a rotation is the one by the opposite angle.
            dquery, dkey = f.kernels.rotate(dquery, cos, sin * -1.0), f.kernels.rotate(dkey, cos, sin * -1.0)
        dkey_value = f.kernels.merge_heads(ops.concat((dkey, dvalue), -1))
        grads = _gradient(f.project_qkv)(x, norm, query, key_value, (f.kernels.merge_heads(dquery), dkey_value))
        return f.kernels.by_workers(dx + grads[0]), grads[1], grads[2], grads[3]


class LongPrefillBlock(LongBlock):
    """One block over a whole prompt; writes its keys and values into the cache. As `PrefillBlock`."""

    def construct(self, x, cos, sin, pieces, shift, documents, index, key_cache, value_cache, *weights):
        _, keys, values, results, _ = self.attend(x, cos, sin, pieces, weights)
        return self.finish(x, index, key_cache, value_cache, len(pieces), *weights, *results, *keys, *values)

    @ms.jit
    def finish(self, x, index, key_cache, value_cache, count,
               norm1, query, key_value, dense, dense_bias, norm2, gate, up, down, down_bias, *parts):
        f = self.functions
        results, keys = ops.concat(parts[:count], 2), ops.concat(parts[count:2 * count], 2)
        values = ops.concat(parts[2 * count:], 2)
        written = f.kernels.write_cache(key_cache, value_cache, keys, values, index)
        weights = (norm1, query, key_value, dense, dense_bias, norm2, gate, up, down, down_bias)
        return f.kernels.by_workers(ops.depend(f.finish(x, f.kernels.merge_heads(results), weights), written))
