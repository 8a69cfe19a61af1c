"""Causal attention over long sequences in little memory, in operations that every device has.

Queries are taken some rows at a time, each with the keys up to its last row only: the scores of one
such piece are all that is ever there, and most of what lies above the diagonal is never computed. The
backward pass computes each piece's probabilities again and needs no more than the result (Dao et al.,
"FlashAttention", arXiv:2205.14135, section 3.1).
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from telechat.nn.portable_kernels import MASKED

SHORT = 2048  # up to here whole matrices of scores are faster and fit
PIECE = 2 ** 24  # scores computed at a time, 64 MB in float32

_product = ops.BatchMatMul()
_product_t = ops.BatchMatMul(transpose_b=True)
_t_product = ops.BatchMatMul(transpose_a=True)
_softmax = ops.Softmax(-1)
_total = ops.ReduceSum(keep_dims=True)


@ops.constexpr
def pieces(batch, heads, length):
    """First row and end of each piece of queries: 64 rows, or twice as many as often as scores fit into PIECE."""
    rows = 64
    while rows * 2 * batch * heads * length <= PIECE:
        rows *= 2
    return tuple((start, min(start + rows, length)) for start in range(0, length, rows))


@ops.constexpr
def token_positions(length):
    """0 … length − 1 as a float32 tensor."""
    return Tensor(np.arange(length, dtype=np.float32))


class LongAttention(nn.Cell):
    """softmax(scale·query·keyᵀ + bias)·value, causal.

    Args:
        scale (float): multiplied into the scores.

    Inputs: query (B, n, S, D), key and value (B, m, S, D); ALiBi's slopes float32 (n,) or None;
    documents int32 (B, S) or None: tokens attend to those of their own number only.
    """

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def construct(self, query, key, value, slopes, documents):
        batch, heads, length, _ = query.shape
        groups = heads // key.shape[1]
        outputs, done = (), query
        for start, end in pieces(batch, heads, length):
            # Each piece waits for the one before, so that its memory can be used again.
            weights = self.probabilities(ops.depend(query, done)[:, :, start:end], key, slopes, documents, start, end)
            done = self.per_head(weights.astype(query.dtype), value[:, :, :end], groups)
            outputs = outputs + (done,)
        return ops.concat(outputs, 2)

    def bprop(self, query, key, value, slopes, documents, out, dout):
        """Gradients of query, key and value."""
        batch, heads, length, dim = query.shape
        key_heads = key.shape[1]
        groups = heads // key_heads
        dqueries = ()
        dkey = ops.zeros((batch * key_heads, length, dim), query.dtype)
        dvalue = ops.zeros((batch * key_heads, length, dim), query.dtype)
        for start, end in pieces(batch, heads, length):
            piece = ops.depend(query, dvalue)[:, :, start:end]
            dpiece = ops.depend(dout, dvalue)[:, :, start:end]
            weights = self.probabilities(piece, key, slopes, documents, start, end)
            dweights = self.scores_of(dpiece, value[:, :, :end], groups)
            inner = _total(dpiece.astype(ms.float32) * out[:, :, start:end].astype(ms.float32), -1)
            dscores = (weights * (dweights.astype(ms.float32) - inner) * self.scale).astype(query.dtype)
            dqueries = dqueries + (self.per_head(dscores, key[:, :, :end], groups),)
            dkey = _add_front(dkey, self.over_queries(dscores, piece, groups), end)
            dvalue = _add_front(dvalue, self.over_queries(weights.astype(query.dtype), dpiece, groups), end)
        none = None if slopes is None else ops.zeros_like(slopes)
        shape = key.shape
        return (ops.concat(dqueries, 2), dkey.reshape(shape), dvalue.reshape(shape), none,
                None if documents is None else ops.zeros_like(documents))

    def probabilities(self, piece, key, slopes, documents, start, end):
        """Of queries start … end over the keys before end: float32 (B, n, end − start, end)."""
        scores = self.scores_of(piece * self.scale, key[:, :, :end], piece.shape[1] // key.shape[1])
        positions = token_positions(key.shape[2])
        distance = positions[start:end].reshape(-1, 1) - positions[:end].reshape(1, -1)
        hidden = (distance < 0).astype(ms.float32) * MASKED
        if slopes is not None:
            hidden = hidden - slopes.reshape(1, -1, 1, 1) * distance
        if documents is not None:
            other = documents[:, start:end].reshape(-1, 1, end - start, 1) != documents[:, :end].reshape(-1, 1, 1, end)
            hidden = hidden + other.astype(ms.float32) * MASKED
        return _softmax(scores.astype(ms.float32) + hidden)

    def scores_of(self, piece, key, groups):
        """piece·keyᵀ for every head: (B, n, R, D), (B, m, T, D) → (B, n, R, T)."""
        batch, heads, rows, dim = piece.shape
        folded = piece.reshape(batch, heads // groups, groups * rows, dim)
        return _product_t(folded, key).reshape(batch, heads, rows, key.shape[2])

    def per_head(self, weights, value, groups):
        """weights·value for every head: (B, n, R, T), (B, m, T, D) → (B, n, R, D)."""
        batch, heads, rows, columns = weights.shape
        folded = weights.reshape(batch, heads // groups, groups * rows, columns)
        return _product(folded, value).reshape(batch, heads, rows, value.shape[3])

    def over_queries(self, weights, piece, groups):
        """weightsᵀ·piece, summed over the query heads of a key-value head: (B·m, T, D)."""
        batch, heads, rows, columns = weights.shape
        dim = piece.shape[3]
        weights = weights.reshape(batch * heads // groups, groups * rows, columns)
        return _t_product(weights, piece.reshape(batch * heads // groups, groups * rows, dim))


def _add_front(total, part, end):
    """total with part added to its first ``end`` rows of axis 1."""
    if end == total.shape[1]:
        return total + part
    return ops.concat((total[:, :end] + part, total[:, end:]), 1)
