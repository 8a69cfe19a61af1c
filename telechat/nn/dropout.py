"""Dropout masks as a pure function of where they are used.

A mask depends on the seed, the step, the sequence's number in the whole batch, the layer and the stream (which head,
or which output) alone. So the backward pass makes the same mask anew instead of keeping it, a resumed run draws what
the uninterrupted one would, and every mesh draws the same.

The generator is Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), so that any
implementation can make any part of a mask. For a value in row r and column c of a mask of W columns:

- key: the seed's low and high 32 bits;
- counter: (r·⌈W/8⌉ + ⌊c/8⌋, sequence, layer·2¹⁶ + stream, step);
- the four 32-bit words of the result are eight lanes of 16 bits, each word's low half first; the value's is lane c mod 8;
- it is kept where the lane is at least T = round(rate·2¹⁶), and what is kept is multiplied by 2¹⁶/(2¹⁶ − T).

On a card the device's own generator makes the masks, each from a seed of its own: `Place.keys`.
"""

import typing

import numpy as np

# Streams beside the heads' numbers: what is added to the residual behind attention and behind the feed-forward
# layer, and the embedding's output (in layer n_layer).
ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT, EMBEDDING_OUTPUT = 0xFFFD, 0xFFFE, 0xFFFF
# Of what an adapter is given: this and the product's place in `telechat.nn.lora.PRODUCTS`.
LORA_INPUT = 0xFFE0
LANES = 8  # of 16 bits in a counter's result
_AT_ONCE = 2 ** 14  # counters: what they take stays in a core's cache
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class Place(typing.NamedTuple):
    """Where masks are used: sequences are their numbers in the whole batch, the others are numbers."""

    seed: int
    step: int
    sequences: typing.Iterable
    layer: int

    def counters(self, streams):
        """The last three words of the counter, for each sequence and stream in turn."""
        return [(sequence, (self.layer << 16) + stream, self.step) for sequence in self.sequences for stream in streams]

    @property
    def key(self):
        """Of the generator."""
        return self.seed & 0xFFFFFFFF, (self.seed >> 32) & 0xFFFFFFFF

    def keys(self, streams):
        """For each mask a number of 63 bits, of its first counter: the seed of a device's generator."""
        words = (philox((0, *counter), self.key)[:2].tolist() for counter in self.counters(streams))
        return [low + ((high & 0x7FFFFFFF) << 32) for low, high in words]


def philox(counter, key):
    """Philox-4x32-10.

    Args:
        counter (tuple): four arrays of uint64, or numbers, below 2³²; they are broadcast.
        key (tuple): two whole numbers below 2³².

    Returns:
        array: uint32 of the counters' shape and 4 at the end.
    """
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    for turn in range(10):
        k0, k1 = (np.uint64((word + turn * step) & 0xFFFFFFFF) for word, step in zip(key, _WEYL))
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (second >> _HALF) ^ c1 ^ k0, second & _LOW, (first >> _HALF) ^ c3 ^ k1, first & _LOW
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), -1).astype(np.uint32)


def threshold(rate):
    """T: lanes below it drop their value."""
    return round(rate * 2 ** 16)


def keep_scale(rate):
    """What a kept value is multiplied by, a float."""
    return 2 ** 16 / (2 ** 16 - threshold(rate))


def dropout_mask(rows, columns, rate, place, streams, first_row=0):
    """The masks of a `Place`'s sequences and some streams of its layer.

    Args:
        rows, columns (int): of a mask; of rows only those from ``first_row`` on.
        rate (float): the probability of dropping, in [0, 1).
        place (Place): where it is used.
        streams (iterable of int): heads, or one of the outputs.

    Returns:
        array: float32 (sequences, streams, rows, columns): 0 where a value is dropped, else `keep_scale`; None where
        rate is 0.
    """
    if rate == 0:
        return None
    width = -(-columns // LANES)
    limit, scale = threshold(rate), np.float32(keep_scale(rate))
    counters = place.counters(streams)
    masks = np.empty((len(counters), rows, columns), np.float32)
    rows_at_once = max(_AT_ONCE // width, 1)
    for mask, counter in zip(masks, counters):
        for first in range(0, rows, rows_at_once):
            last = min(first + rows_at_once, rows)
            blocks = np.arange((first_row + first) * width, (first_row + last) * width, dtype=np.uint64)
            lanes = philox((blocks, *counter), place.key).astype("<u4", copy=False).view("<u2")
            kept = lanes.reshape(last - first, width * LANES)[:, :columns] >= limit
            np.multiply(kept, scale, out=mask[first:last])
    return masks.reshape(len(place.sequences), -1, rows, columns)
