"""Portable kernels with their gradients written out, in the spelling that is fast on CPU.

What was measured there (2 cores, float32; benchmarks/README.md): an elementwise operation that broadcasts takes
three times as long as one on equal shapes, and keeps 16 bytes of tables for every element of its result, so
small operands are tiled first; slices and negation are slow, Split and Concat are not; so is a sum over a short
last axis, which a product with ones replaces. Transpose keeps 20 bytes for every element, for as long as its
graph exists; heads are split off and stacked instead. MindSpore's own gradients of these functions use the slow ones.
"""

import mindspore as ms
from mindspore import nn, ops

_tile = ops.Tile()
_mean = ops.ReduceMean(keep_dims=True)
_column_sums = ops.ReduceSum()
_bias_add = ops.BiasAdd()
_rsqrt = ops.Rsqrt()
_sigmoid = ops.Sigmoid()
_halves = ops.Split(-1, 2)
_join = ops.Concat(-1)
_stack = ops.Stack(1)
_softmax = ops.Softmax(-1)
_product = ops.BatchMatMul()
_product_bt = ops.BatchMatMul(transpose_b=True)
_product_at = ops.BatchMatMul(transpose_a=True)
_matmul = ops.MatMul()


class AddBias(nn.Cell):
    """x (N, H) + bias (H,)."""

    def construct(self, x, bias):
        return _bias_add(x, bias)

    def bprop(self, x, bias, out, dout):
        return dout, _column_sums(dout, 0)


class RmsNorm(nn.Cell):
    """x·r·w, r = 1/√(mean(x²) + ε) of each row: x (N, H), w (H,), float32."""

    def construct(self, x, weight, epsilon):
        return x * self.scale(x, epsilon) * _tile(weight.reshape(1, -1), (x.shape[0], 1))

    def scale(self, x, epsilon):
        return _tile(_rsqrt(_mean(x * x, -1) + epsilon), (1, x.shape[1]))

    def bprop(self, x, weight, epsilon, out, dout):
        """With n = x·r: dw = Σ dout·n over rows; dx = r·(dout·w − n·mean(dout·w·n))."""
        scale = self.scale(x, epsilon)
        normed = x * scale
        inner = dout * _tile(weight.reshape(1, -1), (x.shape[0], 1))
        projection = _tile(_mean(inner * normed, -1), (1, x.shape[1]))
        return (inner - normed * projection) * scale, _column_sums(dout * normed, 0), 0.0


class SplitHeads(nn.Cell):
    """(B·S, n·D) → (B, n, S, D)."""

    def construct(self, x, length, dim):
        return _stack(columns(x, length, dim))

    def bprop(self, x, length, dim, out, dout):
        return merged(dout), 0, 0


class MergeHeads(nn.Cell):
    """(B, n, S, D) → (B·S, n·D)."""

    def construct(self, x):
        return merged(x)

    def bprop(self, x, out, dout):
        return (_stack(columns(dout, x.shape[2], x.shape[3])),)


class SplitKeyValue(nn.Cell):
    """(B·S, m·2D), [k|v] head by head, → keys and values, (B, m, S, D) each."""

    def construct(self, x, length, dim):
        parts = columns(x, length, dim)
        return _stack(parts[::2]), _stack(parts[1::2])

    def bprop(self, x, length, dim, out, dout):
        return merged_key_value(*dout), 0, 0


def columns(x, length, width):
    """(B·S, k·width) → k tensors (B, S, width)."""
    return ops.Split(2, x.shape[1] // width)(x.reshape(-1, length, x.shape[1]))


def rows(x):
    """(B, n, S, D) → n tensors (B, 1, S, D)."""
    return ops.Split(1, x.shape[1])(x)


def merged(x):
    """(B, n, S, D) → (B·S, n·D)."""
    return _join(rows(x)).reshape(-1, x.shape[1] * x.shape[3])


def merged_key_value(key, value):
    """(B, m, S, D) each → (B·S, m·2D), [k|v] head by head."""
    parts = ()
    for key_head, value_head in zip(rows(key), rows(value)):
        parts = (*parts, key_head, value_head)
    return _join(parts).reshape(-1, 2 * key.shape[1] * key.shape[3])


class Rotate(nn.Cell):
    """x·cos + rotate_half(x)·sin: x (B, heads, S, D), cos and sin (1 or B, 1, S, D)."""

    def construct(self, x, cos, sin):
        first, second = _halves(x)
        return x * like(cos, x) + _join((second, first)) * like(self.signed(sin), x)

    def signed(self, sin):
        """rotate_half is (−second, first): the sign goes to the small table."""
        low, high = _halves(sin)
        return _join((low * -1.0, high))

    def bprop(self, x, cos, sin, out, dout):
        """The rotation by the opposite angle."""
        first, second = _halves(dout * like(self.signed(sin), x))
        return dout * like(cos, x) + _join((second, first)), ops.zeros_like(cos), ops.zeros_like(sin)


class Swiglu(nn.Cell):
    """SiLU(gate)·up."""

    def construct(self, gate, up):
        return gate * _sigmoid(gate) * up

    def bprop(self, gate, up, out, dout):
        """SiLU'(g) = s + g·s·(1 − s) = s·(1 + g − g·s), s the sigmoid."""
        sigmoid = _sigmoid(gate)
        silu = gate * sigmoid
        return dout * up * (sigmoid * ((gate - silu) + 1.0)), dout * silu


class Attend(nn.Cell):
    """softmax(query·keyᵀ + mask)·dropout·value, softmax in float32; arguments as `portable_kernels.attention`."""

    def construct(self, query, key, value, mask, dropout):
        return self.result(query, key, value, self.probabilities(query, key, mask), dropout)

    def result(self, query, key, value, probabilities, dropout):
        dropped = self.dropped(probabilities, dropout).astype(query.dtype)
        return _product(by_key_head(dropped, key), value).reshape(query.shape)

    def probabilities(self, query, key, mask):
        scores = self.scores(query, key).astype(ms.float32)
        return _softmax(scores + like(mask, scores))

    def scores(self, query, key):
        """query·keyᵀ: (B, n, S, T)."""
        scores = _product_bt(by_key_head(query, key), key)
        return scores.reshape(query.shape[0], query.shape[1], query.shape[2], key.shape[2])

    def dropped(self, probabilities, dropout):
        return probabilities if dropout is None else probabilities * dropout

    def bprop(self, query, key, value, mask, dropout, out, dout):
        batch, heads, length, dim = query.shape
        total = row_sums((dout * out).astype(ms.float32).reshape(-1, dim)).reshape(batch, heads, length, 1)
        probabilities = self.probabilities(query, key, mask)
        return (*self.backward(dout, total, query, key, value, probabilities, dropout),
                ops.zeros_like(mask), no_gradient(dropout))

    def backward(self, dout, total, query, key, value, probabilities, dropout):
        """dS = P·(dP − Σ dP·P); that sum is total = Σ dout·out (Dao et al., arXiv:2205.14135, section B.2)."""
        dropped = self.dropped(probabilities, dropout).astype(query.dtype)
        dvalue = _product_at(by_key_head(dropped, key), by_key_head(dout, key))
        dprobabilities = self.dropped(self.scores(dout, value).astype(ms.float32), dropout)
        dscores = probabilities * (dprobabilities - _tile(total, (1, 1, 1, key.shape[2])))
        dscores = by_key_head(dscores.astype(query.dtype), key)
        return _product(dscores, key).reshape(query.shape), _product_at(dscores, by_key_head(query, key)), dvalue


def row_sums(x):
    """(N, D) → (N, 1), by a product with ones."""
    return _matmul(x, ops.ones((x.shape[1], 1), x.dtype))


def sums_by_head(x, length, dim):
    """(B·S, n·D) → the sum of each D numbers, (B, n, S, 1)."""
    sums = row_sums(x.reshape(-1, dim)).reshape(x.shape[0], -1)
    return _stack(columns(sums, length, 1))


def by_key_head(x, key):
    """(B, n, S, …) → (B, m, n/m·S, …): below each head of keys (B, m, T, D) the rows of all its n/m heads."""
    return x.reshape(key.shape[0], key.shape[1], -1, x.shape[3])


def no_gradient(x):
    """Zeros for a tensor, None for None."""
    return None if x is None else ops.zeros_like(x)


def like(small, x):
    """``small`` tiled to the shape of x: both of 4 axes, each as long as x's or 1."""
    if small.shape == x.shape:
        return small
    return _tile(small, (x.shape[0] // small.shape[0], x.shape[1] // small.shape[1],
                         x.shape[2] // small.shape[2], x.shape[3] // small.shape[3]))
