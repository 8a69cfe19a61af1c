"""What flash attention needs to know of the tokens: masks, ALiBi's bias, dropout, where documents end."""

import functools

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from telechat.nn.alibi import alibi_slopes
from telechat.nn.device import device_tensor
from telechat.nn.flash_attention import MASK_SIZE, MOST_DOCUMENTS, SHIFT_ROWS, check_end_values
from telechat.nn.positions import set_apart


def flash_tensors(config, length, dtype, padding, segment_ids, heads, dropout):
    """The three of `Kernels.attention_tensors` for `flash_attention`: mask, position_bias, segment_ids.

    Documents and padding go by layout TND, where their ends say all. There ALiBi's bias and the dropout
    mask would change their shape from batch to batch, and compile anew; with them, and for documents
    in several parts, there is a mask of S × S instead, and all of the bias.

    Args:
        config, length, padding, segment_ids, heads: as of `Kernels.attention_tensors`.
        dtype: of the bias, a MindSpore dtype.
        dropout (bool): whether there will be a dropout mask.

    Returns:
        (Tensor, Tensor, Tensor): uint8, the mask that all lengths share or (B, 1, S, S); the bias (1, n, S or
        1024, S) or None; int64, `document_ends`, or None.
    """
    segment_ids = set_apart(padding, segment_ids)
    alibi = config.position_embedding == "alibi"
    ends = None if segment_ids is None or alibi or dropout else document_ends(segment_ids)
    masked = segment_ids is not None and ends is None
    position_bias = None
    if alibi:
        rows = length if masked else min(length, SHIFT_ROWS)
        position_bias = _alibi_bias_tensor(tuple(alibi_slopes(config.n_head)[heads].tolist()), length, rows, dtype)
    mask = hidden(segment_ids) if masked else causal_mask_tensor()
    # In the host's memory, where the operation wants them: from the device every layer would fetch them back, and wait.
    return mask, position_bias, None if ends is None else Tensor(ends)


def hidden(segment_ids):
    """Which keys segment ids (B, S) hide from which queries: a Tensor, uint8 (B, 1, S, S), 1 hides."""
    batch, length = segment_ids.shape
    segment_ids = device_tensor(np.asarray(segment_ids, np.int32))
    others = ops.not_equal(segment_ids.reshape(batch, 1, length, 1), segment_ids.reshape(batch, 1, 1, length))
    return ops.logical_or(others, _future(length)).astype(ms.uint8)


@functools.lru_cache(maxsize=1)
def _future(length):
    return device_tensor(np.triu(np.ones((length, length), bool), 1))


@functools.cache
def causal_mask_tensor():
    """The causal mask of every length, uint8 (2048, 2048), 1 above the diagonal; one for the process."""
    return device_tensor(np.triu(np.ones((MASK_SIZE, MASK_SIZE), np.uint8), 1))


@functools.lru_cache(maxsize=1)
def _alibi_bias_tensor(slopes, length, rows, dtype):
    return device_tensor(alibi_bias_rows(np.array(slopes, np.float32), length, rows), dtype)


def alibi_bias_rows(slopes, length, rows):
    """The last ``rows`` rows of ALiBi's bias, float32 (1, n, rows, S)."""
    rows = np.arange(length - rows, length)
    distance = np.maximum(rows[:, None] - np.arange(length)[None, :], 0).astype(np.float32)
    return (-slopes[:, None, None] * distance)[None]


def document_ends(segment_ids):
    """Where the documents of a batch end, for layout TND with `with_filler`: int64 (B·most + 1,).

    ``most`` is the power of two that holds the documents of every row, so that a few compiled graphs
    serve all batches. The operation takes no empty document: what is missing to ``most`` a row is cut
    from filler tokens behind the batch, at least one token each.

    Args:
        segment_ids (array): int (B, S).

    Returns:
        The array; None where a row has a document in two parts, or the batch has more than 1023.
    """
    batch, length = segment_ids.shape
    most = 2
    while most < (segment_ids[:, 1:] != segment_ids[:, :-1]).sum(axis=1).max() + 1:
        most *= 2
    count = batch * most + 1
    if count > MOST_DOCUMENTS:
        return None
    ends = []
    for row, numbers in enumerate(segment_ids):
        last = np.append(np.flatnonzero(numbers[1:] != numbers[:-1]), length - 1)
        if len(np.unique(numbers[last])) != len(last):
            return None
        ends += list(row * length + last + 1)
    filler = count - batch
    missing = count - len(ends)
    ends += [batch * length + position for position in range(1, missing)] + [batch * length + filler]
    check_end_values(tuple(int(end) for end in ends), batch * length + filler)
    return np.array(ends, np.int64)


def with_filler(x, ends):
    """(B, S, heads, D) → (B·S + filler, heads, D), as `document_ends` counts on it."""
    batch, length, heads, dim = x.shape
    rows = x.reshape(batch * length, heads, dim)
    return ops.concat((rows, ops.zeros((ends.shape[0] - batch, heads, dim), x.dtype)), 0)
