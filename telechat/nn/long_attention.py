"""Portable causal attention over long sequences, piece by piece, without ever holding all the scores.

Queries, keys and values are cut along the sequence. A piece of queries and one or two of keys that it
sees are one call of a small compiled graph, which carries the softmax along from call to call, as FlashAttention
does (Dao et al., arXiv:2205.14135; the backward pass as in arXiv:2307.08691). What a piece sees nothing of (the
future, other documents) is left out. The loop over the pieces is Python's: in one graph MindSpore's CPU backend
would keep the memory of all pieces.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from telechat.nn.alibi import alibi_slopes
from telechat.nn.portable_gradients import by_key_head, like
from telechat.nn.portable_kernels import MASKED
from telechat.nn.positions import set_apart

# Sequences longer than this go in pieces of so many tokens.
WHOLE = 1024
PIECE = 512
# Pieces of keys that a piece of queries attends to in one call: more take memory, and a graph for each number.
AT_ONCE = 2
SMALLEST_SHARE = 1e-30  # of one key in a sum of exponentials, for its logarithm to be exact

_tile = ops.Tile()
_join = ops.Concat(-1)
_stack = ops.Concat(2)
_exp = ops.Exp()
_softmax = ops.Softmax(-1)
_gather = ops.Gather()
_larger = ops.Maximum()
# Several times as fast as ReduceMax on CPU.
_row_maximum = ops.ArgMaxWithValue(-1, True)
_product = ops.BatchMatMul()
_product_bt = ops.BatchMatMul(transpose_b=True)
_product_at = ops.BatchMatMul(transpose_a=True)


def goes_in_pieces(kernels, length, dropout=False):
    """Whether attention over ``length`` tokens is computed in pieces.

    Not where the device has FlashAttention, and not with attention dropout: its masks are as large as the
    scores. In float32 only, which is what a CPU computes in.
    """
    return not kernels.flash and kernels.dtype == ms.float32 and is_long(length, dropout)


def is_long(length, dropout):
    """Whether a CPU's kernels compute attention over ``length`` tokens in pieces."""
    return length > WHOLE and not dropout


class Pieces:
    """How a batch of sequences is cut, and what its pieces see of each other.

    Args:
        config (TeleChatConfig): position bias and number of heads.
        length (int): S; the last piece may be shorter than the others.
        padding (array): (B, S), 0 hides a token from all others; None for no padding.
        documents (array): int (B, S), tokens attend to those of the same number only; None: one a row.
        heads (slice): the heads computed here.
        size (int): tokens of a piece.
    """

    def __init__(self, config, length, padding=None, documents=None, heads=slice(None), size=None):
        size = size or PIECE
        self.size = size
        self.starts = range(0, length, size)
        self._lengths = [min(size, length - start) for start in self.starts]
        self._slopes = None
        if config.position_embedding == "alibi":
            self._slopes = alibi_slopes(config.n_head)[heads].reshape(1, -1, 1, 1)
        documents = set_apart(padding, documents)
        self._documents = None
        if documents is not None:
            documents = np.asarray(documents, np.int32)
            self._documents = [np.ascontiguousarray(documents[:, start:start + size]) for start in self.starts]
        self._masks = {}
        self._seen = [[(other, *seen) for other in range(number + 1)
                       if (seen := self._between(number, other)) is not None] for number in range(len(self.starts))]

    def __len__(self):
        return len(self.starts)

    def seen_by(self, number):
        """What piece ``number`` sees: [(number of a piece of keys, mask, shift, documents, key documents), …].

        Tensors, None where there is nothing to say: mask (1, 1 or n, its length, the keys' length) and shift
        (1, n, 1, 1), float32, are added to the scores; documents, int32 (B, length) each, must be equal.
        """
        return self._seen[number]

    def _between(self, number, other):
        """All but the first of an entry of `seen_by`; None where nothing is seen."""
        documents = (None, None)
        if self._documents is not None:
            own, keys = self._documents[number], self._documents[other]
            if not any(np.isin(row, key_row).any() for row, key_row in zip(own, keys)):
                return None
            if not ((own == own[:, :1]).all() and (keys == own[:, :1]).all()):
                documents = (Tensor(own), Tensor(keys))
        shift = None
        if self._slopes is not None and number != other:
            shift = Tensor(-self._slopes * np.float32(self.starts[number] - self.starts[other]))
        return self._mask(self._lengths[number], self._lengths[other], number == other), shift, *documents

    def _mask(self, rows, columns, same):
        """Causality within a piece, and ALiBi's bias between tokens of two pieces that begin together."""
        key = rows, columns, same
        if key not in self._masks:
            distance = (np.arange(rows)[:, None] - np.arange(columns)).astype(np.float32)[None, None]
            mask = None if self._slopes is None else -self._slopes * distance
            if same:
                mask = np.where(distance >= 0, 0 if mask is None else mask, MASKED)
            self._masks[key] = None if mask is None else Tensor(mask.astype(np.float32))
        return self._masks[key]


class PieceAttention(nn.Cell):
    """Attention in pieces: softmax(query·keyᵀ)·value, where each token sees itself and those before it.

    Args:
        by_workers (callable): of `Kernels`, for the result of each graph.
    """

    def __init__(self, by_workers):
        super().__init__()
        self.by_workers = by_workers

    def construct(self, query, key, value, pieces):
        """query (B, n, S, D), multiplied by the scale, key and value (B, m, S, D) → (B, n, S, D)."""
        parts = [[part.contiguous() for part in ops.split(whole, pieces.size, 2)] for whole in (query, key, value)]
        return ops.concat(self.attend(*parts, pieces)[0], 2)

    def attend(self, queries, keys, values, pieces):
        """The result, and what `attend_backward` starts from.

        Args:
            queries (sequence of Tensor): pieces of float32 (B, n, S, D), multiplied by the scale.
            keys, values (sequence of Tensor): pieces of (B, m, S, D), where n is a multiple of m.
            pieces (Pieces): who sees whom.

        Returns:
            (list, list): pieces of the result (B, n, S, D), and of −log Σ exp(scores) over what each query
            sees, (B, n, S, 1), for `attend_backward`.
        """
        seen = [[(keys[other], values[other], *rest) for other, *rest in pieces.seen_by(number)]
                for number in range(len(pieces))]
        results, totals = map(list, zip(*map(self._quickly, queries, seen)))
        for number, total in enumerate(totals):
            if not np.isfinite(total.asnumpy()).all():
                results[number], totals[number] = self._exactly(queries[number], seen[number])
        return results, [-1.0 * total for total in totals]

    def _exactly(self, query, seen, result=None, total=None):
        """Result of a piece of queries, and log Σ exp(scores), with all that it sees, its own piece first."""
        if result is None:
            result, total = ops.zeros_like(query), ops.full((*query.shape[:3], 1), MASKED, dtype=ms.float32)
        for key, value, *bias in reversed(seen):
            result, total = self.add_piece(query, key, value, result, total, *bias)
        return result, total

    def _quickly(self, query, seen):
        """As `_exactly`, `AT_ONCE` pieces in a call; where that is not exact, totals are not numbers."""
        *earlier, (key, value, mask, _, documents, _) = seen
        if documents is not None:  # then all the others have them too
            return self._exactly(query, seen)
        plain = [piece[:2] for piece in earlier if all(part is None for part in piece[2:])]
        biased = [piece for piece in earlier if any(part is not None for part in piece[2:])]
        first = len(plain) % AT_ONCE
        result, total = self.attend_first(query, mask, *_in_a_row(plain[:first] + [(key, value)]))
        for start in range(first, len(plain), AT_ONCE):
            result, total = self.add_pieces(query, result, total, *_in_a_row(plain[start:start + AT_ONCE]))
        return self._exactly(query, biased, result, total)

    def attend_backward(self, queries, keys, values, normalisers, dresults, inners, pieces):
        """The gradients of `attend`.

        Args:
            queries, keys, values, pieces: as given to it.
            normalisers (sequence of Tensor): as it returned them.
            dresults (sequence of Tensor): the gradient of its result, in pieces.
            inners (sequence of Tensor): pieces of −Σ dresult·result over D, (B, n, S, 1).

        Returns:
            (list, list, list): pieces of the gradients of queries, keys and values.
        """
        dqueries, dkeys, dvalues = ([ops.zeros_like(piece) for piece in part] for part in (queries, keys, values))
        for number, query in enumerate(queries):
            for other, *seen in pieces.seen_by(number):
                dqueries[number], dkeys[other], dvalues[other] = self.piece_backward(
                    query, keys[other], values[other], normalisers[number], dresults[number], inners[number],
                    dqueries[number], dkeys[other], dvalues[other], *seen)
        return dqueries, dkeys, dvalues

    @ms.jit
    def attend_first(self, query, mask, *keys_and_values):
        """Attend to some whole pieces and, the last one, the queries' own under its mask: as `add_piece`.

        The sum of exponentials comes from each token's share in its own result. With a share under
        `SMALLEST_SHARE` that would be inexact: the total is not a number then.
        """
        *keys, own = keys_and_values[:len(keys_and_values) // 2]
        values = _stack(keys_and_values[len(keys_and_values) // 2:])
        batch, heads, length, _ = query.shape
        scores = _add_bias(_product_bt(by_key_head(query, own), own), query, mask, None, None, None)
        if keys:
            keys = _stack(keys)
            scores = _join((_product_bt(by_key_head(query, keys), keys).reshape(batch, heads, length, -1), scores))
        weights = _softmax(scores)
        result = _product(by_key_head(weights, values), values).reshape(query.shape)
        width = scores.shape[3]
        row = ops.arange(batch * heads * length).astype(ms.int32)
        itself = row * width + row % length + (width - length)
        total = _total(_gather(scores.reshape(-1), itself, 0), _gather(weights.reshape(-1), itself, 0))
        return self.by_workers(result), total.reshape(batch, heads, length, 1)

    @ms.jit
    def add_piece(self, query, key, value, result, total, mask, shift, documents, key_documents):
        """Go on with one more piece of keys: result (B, n, Q, D) and log Σ exp(scores) (B, n, Q, 1) with it."""
        scores = _add_bias(_product_bt(by_key_head(query, key), key), query, mask, shift, documents, key_documents)
        highest = _larger(_row_maximum(scores)[1], total)
        weights = by_key_head(_exp(scores - _tile(highest, (1, 1, 1, scores.shape[3]))), key)
        sums = _product(weights, ops.ones((*key.shape[:3], 1), ms.float32)).reshape(total.shape)
        kept = _exp(total - highest)
        share = 1.0 / (kept + sums)
        width = (1, 1, 1, query.shape[3])
        new = _product(weights, value).reshape(result.shape)
        result = result * _tile(kept * share, width) + new * _tile(share, width)
        return self.by_workers(result), highest - ops.log(share)

    @ms.jit
    def add_pieces(self, query, result, total, *keys_and_values):
        """As `add_piece`, some pieces without bias, which do not outweigh those before them altogether.

        What there was so far is one more key, whose score is ``total``: softmax gives it its share in the new
        result, and the products take care of its column. As in `attend_first`, the share may be too small.
        """
        half = len(keys_and_values) // 2
        key, value = _stack(keys_and_values[:half]), _stack(keys_and_values[half:])
        zeros = ops.zeros((*key.shape[:3], 1), ms.float32)
        last = _join((ops.zeros((*key.shape[:2], 1, key.shape[3]), ms.float32),
                      ops.ones((*key.shape[:2], 1, 1), ms.float32)))
        keys, values = (_stack((_join((part, zeros)), last)) for part in (key, value))
        weights = _softmax(_product_bt(by_key_head(_join((query, total)), key), keys))
        new, share = ops.split(_product(weights, values), (key.shape[3], 1), -1)
        new, share = new.reshape(result.shape), share.reshape(total.shape)
        return self.by_workers(result * _tile(share, (1, 1, 1, query.shape[3])) + new), _total(total, share)

    @ms.jit
    def piece_backward(self, query, key, value, normaliser, dresult, inner, dquery, dkey, dvalue,
                       mask, shift, documents, key_documents):
        """Add what one pair of pieces contributes to the three gradients.

        With P = exp(S + normaliser): dS = P·(dP + inner). Both sums are made by the products, where they cost
        next to nothing: query and dresult get one more column for it, key and value a column of ones.
        """
        one = ops.ones((*key.shape[:3], 1), ms.float32)
        scores = _product_bt(by_key_head(_join((query, normaliser)), key), _join((key, one)))
        probabilities = by_key_head(_exp(_add_bias(scores, query, mask, shift, documents, key_documents)), key)
        rows, drows = by_key_head(query, key), by_key_head(dresult, key)
        dscores = probabilities * _product_bt(by_key_head(_join((dresult, inner)), key), _join((value, one)))
        return (self.by_workers(dquery + _product(dscores, key).reshape(query.shape)),
                dkey + _product_at(dscores, rows), dvalue + _product_at(probabilities, drows))


def _in_a_row(pieces):
    """[(key, value), …] as separate arguments: all keys, then all values."""
    keys, values = zip(*pieces)
    return *keys, *values


def _total(score, share):
    """log Σ exp(scores), from one score and its share of the sum; not a number where the share is too small."""
    return ops.select(share < SMALLEST_SHARE, np.nan, score - ops.log(share))


def _add_bias(scores, query, mask, shift, documents, key_documents):
    """Scores as (B, n, Q, K), with what `Pieces.seen_by` says added."""
    scores = scores.reshape(query.shape[0], query.shape[1], query.shape[2], scores.shape[3])
    if mask is not None:
        scores = scores + like(mask, scores)
    if shift is not None:
        scores = scores + like(shift, scores)
    if documents is not None:
        batch, length = documents.shape
        same = documents.reshape(batch, 1, length, 1) == key_documents.reshape(batch, 1, 1, -1)
        scores = scores + like(ops.select(same, 0.0, MASKED), scores)
    return scores
