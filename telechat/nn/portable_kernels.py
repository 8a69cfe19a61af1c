"""The computing kernels in operations that every device has; `telechat.nn.kernels` says what each computes.

They are written to be read, and are what the tests of the other kernels compare with. One thing is bent: what is smaller
than the other operand is repeated first (`expand`), and heads are split off and stacked instead of transposed, since on a
CPU MindSpore's kernels that broadcast or transpose keep 16 to 20 bytes for every element as long as their graph exists.
"""

import math

import mindspore as ms
from mindspore import Tensor, nn, ops

# What a masked score gets: finite, so that a row with nothing to attend to stays finite too.
MASKED = -1e30

_matmul = ops.MatMul(transpose_b=True)
_product = ops.BatchMatMul()
_product_bt = ops.BatchMatMul(transpose_b=True)
_product_at = ops.BatchMatMul(transpose_a=True)
_bias_add = ops.BiasAdd()
_softmax = ops.Softmax(-1)
_sum = ops.ReduceSum(keep_dims=True)
_tile = ops.Tile()
_gather = ops.Gather()
_mean = ops.ReduceMean(keep_dims=True)
_adam, _assign = ops.Adam(), ops.Assign()


def expand(small, x):
    """``small`` repeated to the shape of x: each of its axes is as long as x's or 1."""
    return _tile(small, tuple([x.shape[axis] // small.shape[axis] for axis in range(x.ndim)]))


def embedding(input_ids, weight, dtype):
    """Rows of the table."""
    return _gather(weight, input_ids, 0).astype(dtype)


def embedding_of_bits(input_ids, weight, dtype):
    """As `embedding` of a bfloat16 table where there is no bfloat16 Gather: the same bits as int16.

    Outside compiled graphs only.
    """
    return _gather(weight.view(ms.int16), input_ids, 0).view(ms.bfloat16).astype(dtype)


def linear(x, weight, bias=None):
    """x (N, in), weight (out, in), bias (out,) or None → x·weightᵀ + bias, (N, out) in x's dtype."""
    return add_bias(_matmul(x, weight.astype(x.dtype)), bias)


def add_bias(x, bias):
    """x (N, H) + bias (H,); x where bias is None."""
    return x if bias is None else _bias_add(x, bias.astype(x.dtype))


def rms_norm(x, weight, epsilon):
    """RMSNorm (arXiv:1910.07467) of x (N, H) with weight (H,); statistics in float32, x's dtype out."""
    wide = x.astype(ms.float32)
    normed = wide * expand(ops.rsqrt(_mean(wide * wide, -1) + epsilon), wide)
    return (normed * expand(weight.astype(ms.float32).reshape(1, -1), wide)).astype(x.dtype)


def split_heads(x, length, dim):
    """(B·S, n·D) → (B, n, S, D)."""
    return ops.stack(ops.split(x.reshape(-1, length, x.shape[1]), dim, 2), 1)


def merge_heads(x):
    """(B, n, S, D) → (B·S, n·D)."""
    return ops.concat(ops.split(x, 1, 1), 3).reshape(-1, x.shape[1] * x.shape[3])


def split_key_value(x, length, dim):
    """(B·S, m·2D), [k|v] head by head, → keys and values, (B, m, S, D) each."""
    return ops.split(split_heads(x, length, 2 * dim), dim, 3)


def merge_key_value(key, value):
    """The inverse of `split_key_value`."""
    return merge_heads(ops.concat((key, value), 3))


def rotate(x, cos, sin):
    """Rotary positions in the rotate-half form: x·cos + (−x₂, x₁)·sin.

    x (B, heads, S, D); cos and sin float32, (1, 1, S, D) or (B, 1, S, D), both halves of D equal.
    """
    first, second = ops.split(x, x.shape[3] // 2, 3)
    return x * expand(cos.astype(x.dtype), x) + ops.concat((-second, first), 3) * expand(sin.astype(x.dtype), x)


def attention(query, key, value, mask, scale, dropout=None):
    """softmax(scale·query·keyᵀ + mask)·value.

    Args:
        query (Tensor): (B, n, S, D).
        key, value (Tensor): (B, m, T, D), where n is a multiple of m (grouped heads).
        mask (Tensor): float32, added to the scores, broadcast to (B, n, S, T); `MASKED` hides a key.
        scale (float): usually D^(−1/2).
        dropout (Tensor): float32 (B, n, S, T), multiplied into the probabilities; None for none.

    Returns:
        Tensor: (B, n, S, D) in query's dtype; softmax in float32.
    """
    return _attend(query * scale, key, value, mask, dropout)


class _Attend(nn.Cell):
    """softmax(query·keyᵀ + mask)·dropout·value, as of `attention`."""

    def construct(self, query, key, value, mask, dropout):
        dropped = self.dropped(self.probabilities(query, key, mask), dropout).astype(query.dtype)
        return _product(self.by_key_head(dropped, key), value).reshape(query.shape)

    def probabilities(self, query, key, mask):
        scores = self.scores(query, key).astype(ms.float32)
        return _softmax(scores + expand(mask, scores))

    def scores(self, query, key):
        """query·keyᵀ: (B, n, S, T)."""
        scores = _product_bt(self.by_key_head(query, key), key)
        return scores.reshape(query.shape[0], query.shape[1], query.shape[2], key.shape[2])

    def by_key_head(self, x, key):
        """(B, n, S, …) → (B, m, n/m·S, …): below each head of keys (B, m, T, D) the rows of all its n/m heads."""
        return x.reshape(key.shape[0], key.shape[1], -1, x.shape[3])

    def dropped(self, probabilities, dropout):
        return probabilities if dropout is None else probabilities * dropout

    def bprop(self, query, key, value, mask, dropout, out, dout):
        """dS = P·(dP − Σ dP·P), and that sum is Σ dout·out (Dao et al., arXiv:2205.14135, section B.2)."""
        probabilities = self.probabilities(query, key, mask)
        dropped = self.by_key_head(self.dropped(probabilities, dropout).astype(query.dtype), key)
        dprobabilities = self.dropped(self.scores(dout, value).astype(ms.float32), dropout)
        total = _sum((dout * out).astype(ms.float32), -1)
        dscores = probabilities * (dprobabilities - expand(total, dprobabilities))
        dscores = self.by_key_head(dscores.astype(query.dtype), key)
        return (_product(dscores, key).reshape(query.shape), _product_at(dscores, self.by_key_head(query, key)),
                _product_at(dropped, self.by_key_head(dout, key)), ops.zeros_like(mask),
                None if dropout is None else ops.zeros_like(dropout))


_attend = _Attend()


def swiglu(gate, up):
    """SiLU(gate)·up (arXiv:2002.05202), elementwise."""
    return gate * ops.sigmoid(gate) * up


def token_cross_entropy(logits, labels, weights):
    """The gradient of the sum is (probabilities − 1 at the label)·weight."""
    logits = logits.astype(ms.float32)
    index = ops.stack((ops.arange(labels.shape[0]).astype(ms.int32), labels), -1)
    losses = -ops.gather_nd(ops.log_softmax(logits, -1), index) * weights
    gradient = _softmax(logits) * expand(weights.reshape(-1, 1), logits)
    return losses, ops.tensor_scatter_add(gradient, index, -weights)


def adamw_scalars(updates, rate, betas, epsilon, decay):
    """With c1 = 1 − β1^t and c2 = 1 − β2^t: rate·√c2/c1 and eps·√c2, and what weight decay leaves of a parameter."""
    c1, root_c2 = 1 - betas[0] ** updates, math.sqrt(1 - betas[1] ** updates)
    numbers = (rate * root_c2 / c1, *betas, epsilon * root_c2, 1 - rate * decay, 1.0)
    return [Tensor(value, ms.float32) for value in (updates, *numbers)]


def adamw(parameter, first_moment, second_moment, gradient, step, rate, beta1, beta2, epsilon, left):
    """Weight decay, then Adam, whose own bias correction is off: `adamw_scalars` folds it into rate and epsilon."""
    decayed = _assign(parameter, parameter * left)
    return _adam(ops.depend(parameter, decayed), first_moment, second_moment, 0.0, 0.0, rate, beta1, beta2, epsilon,
                 gradient)


def sums_of_squares(tensors, by_rows):
    """``by_rows`` on CPU: MindSpore's kernel splits a sum over everything among as many threads as it finds fastest at
    the moment, so that its last bits change from run to run."""
    rows = ()
    for tensor in tensors:
        tensor = tensor.astype(ms.float32)
        squares = tensor * tensor
        if not by_rows:
            squares = squares.sum().reshape(1)
        rows = rows + (squares if squares.ndim == 1 else squares.sum(axis=-1),)
    return ops.concat(rows)
