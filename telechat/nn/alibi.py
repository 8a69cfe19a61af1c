"""ALiBi, the position bias that may stand in for rotary positions.

Press et al., "Train Short, Test Long" (arXiv:2108.12409), with the slopes 2^(−8i/n).
"""

import numpy as np


def alibi_slopes(n_head):
    """The slope of each head, 2^(−8i/n) for i = 1 … n; float32 of shape (n_head,)."""
    return np.exp2(-8.0 * np.arange(1, n_head + 1) / n_head).astype(np.float32)


def alibi_bias(n_head, query_positions, key_positions):
    """The bias −slope·(query position − key position) added to the attention scores.

    Args:
        n_head (int): number of heads.
        query_positions, key_positions (array of int): shapes (Q,) and (K,).

    Returns:
        float32 of shape (n_head, Q, K); 0 where the key lies ahead of the query (masked anyway).
    """
    distance = np.asarray(query_positions)[:, None] - np.asarray(key_positions)[None, :]
    return -alibi_slopes(n_head)[:, None, None] * np.maximum(distance, 0).astype(np.float32)
