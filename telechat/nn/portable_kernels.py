"""The computing kernels in operations that every device has; `telechat.nn.kernels` says what each computes.

They are spelt as was measured to be fast on CPU: a product as one MatMul over 2-D activations,
RMSNorm by ReduceMean and Rsqrt, softmax attention with an additive mask.
"""

import math

import mindspore as ms
from mindspore import Tensor, ops

from telechat.nn.portable_gradients import (AddBias, Attend, MergeHeads, RmsNorm, Rotate, SplitHeads, SplitKeyValue,
                                            Swiglu, merged_key_value, sums_by_head)

# What a masked score gets: finite, so that a row with nothing to attend to stays finite too.
MASKED = -1e30

# For so many rows of x the product weight·xᵀ takes less time than x·weightᵀ on CPU, with 16 rows a fifth.
FEWEST_TURNED, MOST_TURNED = 5, 64

_matmul = ops.MatMul(transpose_b=True)
_add_bias, _rms_norm, _rotate, _swiglu, _attend = AddBias(), RmsNorm(), Rotate(), Swiglu(), Attend()
_split_heads, _split_key_value, _merge_heads = SplitHeads(), SplitKeyValue(), MergeHeads()
_gather = ops.Gather()
_adam, _assign = ops.Adam(), ops.Assign()
_tile = ops.Tile()  # as in portable_gradients.py, what is small is tiled
_sine = ops.Sin()


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
    weight = weight.astype(x.dtype)
    if FEWEST_TURNED <= x.shape[0] <= MOST_TURNED:
        return add_bias(_matmul(weight, x).transpose(1, 0), bias)
    return add_bias(_matmul(x, weight), bias)


def add_bias(x, bias):
    """x (N, H) + bias (H,); x where bias is None."""
    return x if bias is None else _add_bias(x, bias.astype(x.dtype))


def rms_norm(x, weight, epsilon):
    """RMSNorm (arXiv:1910.07467) of x (N, H) with weight (H,); statistics in float32, x's dtype out."""
    return _rms_norm(x.astype(ms.float32), weight.astype(ms.float32), epsilon).astype(x.dtype)


def split_heads(x, length, dim):
    """(B·S, n·D) → (B, n, S, D)."""
    return _split_heads(x, length, dim)


def split_key_value(x, length, dim):
    """(B·S, m·2D), [k|v] head by head, → keys and values, (B, m, S, D) each."""
    return _split_key_value(x, length, dim)


def merge_heads(x):
    """(B, n, S, D) → (B·S, n·D)."""
    return _merge_heads(x)


def merge_key_value(key, value):
    """The inverse of `split_key_value`."""
    return merged_key_value(key, value)


def rotate(x, cos, sin):
    """Rotary positions in the rotate-half form.

    x (B, heads, S, D); cos and sin float32, (1, 1, S, D) or (B, 1, S, D), both halves of D equal.
    """
    return _rotate(x, cos.astype(x.dtype), sin.astype(x.dtype))


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


def keeps_probabilities(length, dim):
    """Whether training keeps attention's probabilities of sequences of ``length`` with heads of size ``dim``.

    That is a head's and token's S numbers, beside the some 12·D (H is n·D) that a block keeps anyway.
    """
    return length <= 4 * dim


def attention_in_training(query, key, value, mask, scale, dropout=None):
    """`attention` with its heads merged, and the probabilities; None where `keeps_probabilities` says no."""
    query = query * scale
    probabilities = _attend.probabilities(query, key, mask)
    result = _attend.result(query, key, value, probabilities, dropout)
    return merge_heads(result), probabilities if keeps_probabilities(*query.shape[2:]) else None


def attention_backward(dattended, attended, query, key, value, probabilities, mask, scale, dropout=None):
    """The gradients of query, key and value from that of `attention_in_training`'s first result, ``attended``."""
    length, dim = query.shape[2:]
    query = query * scale
    if probabilities is None:
        probabilities = _attend.probabilities(query, key, mask)
    total = sums_by_head((dattended * attended).astype(ms.float32), length, dim)
    dquery, dkey, dvalue = _attend.backward(split_heads(dattended, length, dim), total, query, key, value,
                                            probabilities, dropout)
    return dquery * scale, dkey, dvalue


def swiglu(gate, up):
    """SiLU(gate)·up (arXiv:2002.05202), elementwise."""
    return _swiglu(gate, up)


def token_cross_entropy(logits, labels, weights):
    """Losses and gradient in one pass over the logits."""
    logits = logits.astype(ms.float32)
    width = (1, logits.shape[1])
    # ReduceMax takes six times as long on CPU.
    shifted = logits - _tile(ops.ArgMaxWithValue(axis=-1, keep_dims=True)(logits)[1], width)
    exponentials = ops.exp(shifted)
    total = ops.ReduceSum(keep_dims=True)(exponentials, -1)
    rows = ops.arange(0, labels.shape[0]).astype(ms.int32)
    index = ops.stack((rows, labels), -1)
    losses = ops.log(total).reshape(-1) - ops.gather_nd(shifted, index)
    gradient = exponentials * _tile(weights.reshape(-1, 1) / total, width)
    gradient = ops.tensor_scatter_add(gradient, index, -weights)
    return losses * weights, gradient


def adamw_scalars(updates, rate, betas, epsilon, decay):
    """With c1 = 1 − β1^t and c2 = 1 − β2^t: rate·√c2/c1 and eps·√c2, and what weight decay leaves of a parameter."""
    c1, root_c2 = 1 - betas[0] ** updates, math.sqrt(1 - betas[1] ** updates)
    numbers = (rate * root_c2 / c1, *betas, epsilon * root_c2, 1 - rate * decay, 1.0)
    return [Tensor(value, ms.float32) for value in (updates, *numbers)]


def adamw(parameter, first_moment, second_moment, gradient, step, rate, beta1, beta2, epsilon, left):
    """Weight decay, then Adam, whose own bias correction is off: `adamw_scalars` folds it into rate and epsilon.

    AdamWeightDecay, one kernel for both, takes two to four times as long on CPU.
    """
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


def by_workers(result):
    """``result``, out of a graph that MindSpore's worker threads run: one with more than 100 kernels.

    The thread that calls a smaller graph runs it itself, and yields in a loop while the workers compute: three
    threads on two cores, so that a product gets 97 or 190 GFLOP/s as it happens (benchmarks/README.md).
    What makes the graph large are kernels on one number; together they take some 0.3 ms.
    """
    return ops.depend(result, _hundred_kernels(ops.ones((1,), ms.float32)))


def _hundred_kernels(x):
    """Nested calls: a loop that MindSpore unrolls takes 0.17 s to compile, these 0.02 s."""
    ten = _ten_kernels
    return ten(ten(ten(ten(ten(ten(ten(ten(ten(ten(x))))))))))


def _ten_kernels(x):
    sine = _sine
    return sine(sine(sine(sine(sine(sine(sine(sine(sine(sine(x))))))))))
