"""Portable causal attention over long sequences, one block of queries after the other: never all the scores at once.

A block attends to all keys under its rows of the mask, in a graph that serves every block (a shorter last one has its own).
The loop over blocks is Python's: in one graph MindSpore's CPU backend keeps the memory of all of them.
"""

import mindspore as ms
from mindspore import nn, ops

from telechat.nn.device import device_tensor
from telechat.nn.dropout import dropout_mask
from telechat.nn.portable_kernels import attention
from telechat.nn.positions import causal_mask

LONGEST_WHOLE = 1024  # tokens of a sequence whose scores are made all at once
SCORES = 2 ** 19  # of a head, made at a time of a longer one

_gradient = ops.GradOperation(get_all=True, sens_param=True)


def is_long(length):
    """Whether portable attention over ``length`` tokens goes by blocks."""
    return length > LONGEST_WHOLE


def block_size(length):
    """Queries of a block of sequences of ``length`` tokens."""
    return max(SCORES // length, 1)


class BlockMasks:
    """In the place of a mask or of dropout masks: the rows that a block of queries needs, made when they are asked for.

    Args:
        length (int): S.
        make (callable): make(first, last) → float32 array (1 or B, 1 or n, last − first, S).
    """

    def __init__(self, length, make):
        self.length = length
        self.make = make

    def blocks(self):
        """[(first, last) query of each block]."""
        size = block_size(self.length)
        return [(first, min(first + size, self.length)) for first in range(0, self.length, size)]

    def rows(self, first, last):
        """The masks of some queries, a Tensor."""
        return device_tensor(self.make(first, last))


def causal_blocks(config, length, padding=None, segment_ids=None, heads=slice(None)):
    """`positions.causal_mask` of the same arguments as `BlockMasks`."""
    return BlockMasks(length, lambda first, last: causal_mask(config, length, padding, segment_ids, heads,
                                                              slice(first, last)))


def dropout_blocks(length, rate, place, heads):
    """`dropout.dropout_mask` of attention's probabilities as `BlockMasks`."""
    return BlockMasks(length, lambda first, last: dropout_mask(last - first, length, rate, place, heads, first))


class BlockwiseAttention(nn.Cell):
    """softmax(scale·query·keyᵀ + mask)·dropout·value, as `portable_kernels.attention`, and its gradient.

    query (B, n, S, D); key and value (B, m, S, D); masks and dropout `BlockMasks`, dropout None for none. Not for graphs.
    """

    def construct(self, query, key, value, masks, scale, dropout=None):
        """(B, n, S, D)."""
        return ops.concat([self.attend(part(query, block), key, value, masks.rows(*block), scale, rows(dropout, block))
                           for block in masks.blocks()], 2)

    def backward(self, dresult, query, key, value, masks, scale, dropout=None):
        """The gradients of query, key and value, from the result's."""
        dqueries, dkey, dvalue = [], ops.zeros_like(key), ops.zeros_like(value)
        for block in masks.blocks():
            dquery, dkey, dvalue = self.attend_backward(part(dresult, block), part(query, block), key, value, dkey, dvalue,
                                                        masks.rows(*block), scale, rows(dropout, block))
            dqueries.append(dquery)
        return ops.concat(dqueries, 2), dkey, dvalue

    @ms.jit
    def attend(self, query, key, value, mask, scale, dropout):
        """A block's result."""
        return attention(query, key, value, mask, scale, dropout)

    @ms.jit
    def attend_backward(self, dresult, query, key, value, dkey, dvalue, mask, scale, dropout):
        """A block's gradient, and those of keys and values with its share added."""
        gradients = _gradient(attention)(query, key, value, mask, scale, dropout, dresult)
        return gradients[0], dkey + gradients[1], dvalue + gradients[2]


def part(x, block):
    """The queries of a block."""
    return x[:, :, block[0]:block[1]].contiguous()


def rows(dropout, block):
    """Dropout masks of a block; None for none."""
    return None if dropout is None else dropout.rows(*block)
