"""Dropout masks as a pure function of where they are used.

A mask depends on the seed, step, micro-batch, layer and site alone. So the backward pass makes the
same mask anew instead of keeping it, and a resumed run draws what the uninterrupted one would.
"""

import numpy as np


def dropout_mask(shape, rate, seed, step, micro_batch, layer, site):
    """A float32 mask: 1/(1 − rate) where a value is kept, 0 where it is dropped.

    Args:
        shape (tuple): of the tensor that it multiplies.
        rate (float): the probability of dropping, in [0, 1).
        seed, step, micro_batch, layer, site (int): where it is used; equal values, equal mask.

    Returns:
        The array, or None where rate is 0.
    """
    if rate == 0:
        return None
    # A counter-based generator: the low word counts within the mask, the others say which mask it is.
    generator = np.random.Philox(key=seed, counter=[0, 4 * layer + site, micro_batch, step])
    kept = np.random.Generator(generator).random(shape, np.float32) >= np.float32(rate)
    return kept.astype(np.float32) * np.float32(1 / (1 - rate))
