"""Attention over a key-value cache in blocks, in operations that every device has.

A layer's keys, and its values, lie as (blocks, heads, block size, D): a head's tokens of a block together. Which blocks
hold a sequence, in order, a table says (telechat/generation/block_table.py). `telechat.nn.kernels` says what each
function computes.
"""

import mindspore as ms
import numpy as np
from mindspore import ops

from telechat.nn.alibi import alibi_slopes
from telechat.nn.portable_kernels import MASKED, attention, rotate

_gather = ops.Gather()
_write = ops.ScatterUpdate()
_split = ops.Split(-1, 2)


def cache_rows(places, heads, block_size):
    """The row of each head's token among all rows (blocks · heads · block size, D) of a cache: int32 (B · heads · S,).

    places (array): of `BlockTable.places`, int (B, S).
    """
    places = places[:, None, :]
    blocks = places // block_size * heads + np.arange(heads)[None, :, None]
    return (blocks * block_size + places % block_size).reshape(-1).astype(np.int32)


def write_cache(key_cache, value_cache, key, value, index):
    """By rows: caches here are (blocks · heads · block size, D)."""
    dim = key_cache.shape[-1]
    return _write(key_cache, index, key.reshape(-1, dim)), _write(value_cache, index, value.reshape(-1, dim))


def read_cache(cache, table):
    """The blocks of each sequence in a row: a cache and int32 (B, blocks) → (B, heads, T, D)."""
    batch, width = table.shape
    _, heads, size, dim = cache.shape
    return _gather(cache, table, 0).transpose(0, 2, 1, 3, 4).reshape(batch, heads, width * size, dim)


def decoding_places(positions, index, table, slopes, block_size):
    """The rows to write, the additive mask over all that a sequence's blocks can hold, (B, 1 or n, 1, T), and the table."""
    batch = positions.shape[0]
    distance = positions.reshape(batch, 1, 1, 1) - ops.arange(table.shape[1] * block_size).astype(ms.int32)
    bias = 0.0 if slopes is None else -slopes * distance.astype(ms.float32)
    mask = ops.select(distance >= 0, bias + ops.zeros_like(distance).astype(ms.float32), MASKED)
    return index, mask, table


def cached_attention(query, key_value, rotation, caches, places, scale):
    """Over all the tokens that the sequences' blocks have room for, which the mask hides where there are none yet."""
    index, mask, table = places
    key_cache, value_cache, keys, values = caches
    batch, dim = query.shape[0], key_cache.shape[-1]
    query = query.reshape(batch, -1, 1, dim)
    key, value = _split(key_value.reshape(batch, -1, 1, 2 * dim))
    if rotation is not None:
        cos, sin = rotation[0].reshape(batch, 1, 1, dim), rotation[1].reshape(batch, 1, 1, dim)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    written = write_cache(key_cache, value_cache, key, value, index)
    keys, values = read_cache(ops.depend(keys, written), table), read_cache(ops.depend(values, written), table)
    return attention(query, keys, values, mask, scale).reshape(batch, -1)


def chunk_mask(config, positions, length, heads=slice(None)):
    """The additive mask of a part of a prompt over its sequence so far, with ALiBi's bias where the model has it.

    Args:
        config (TeleChatConfig): ``position_embedding`` and ``n_head`` decide.
        positions (array): int (B, S), of the tokens; negative ones see nothing but stay finite.
        length (int): T, tokens that are looked at.
        heads (slice): of the n_head heads, those wanted, n.

    Returns:
        float32 array (B, 1 or n, S, T).
    """
    distance = positions[:, None, :, None] - np.arange(length)
    bias = np.zeros((), np.float32)
    if config.position_embedding == "alibi":
        bias = -alibi_slopes(config.n_head)[heads].reshape(1, -1, 1, 1) * np.maximum(distance, 0).astype(np.float32)
    return np.where(distance >= 0, bias, np.float32(MASKED)).astype(np.float32)
