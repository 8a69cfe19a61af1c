"""Binding of PagedAttention and ReshapeAndCache, decoding on a cache in blocks (Kwon et al., arXiv:2309.06180).

Both exist among MindSpore's internal kernels alone (`telechat.nn.inference`). What these do not take they refuse on
the card, or not at all, so it is checked here while a graph is compiled.
"""

import os

import mindspore as ms
from mindspore import ops
from mindspore.ops import auto_generate

from telechat.errors import InputError

LARGEST_HEAD = 256
LARGEST_BLOCK = 16384  # head size · tokens
USUAL_BLOCK = 128  # tokens
BLOCKS = (16, 32, 64, 128)  # tokens that a block may have
LARGEST_GROUP = 128  # query heads of a key-value head
# Names kernels for which MindSpore takes ATB's: its PagedAttention looks the lengths up on the host by their name, and
# finds nothing where the tensor was sent to the card before.
_SWITCHED_OFF = "MS_INTERNAL_DISABLE_CUSTOM_KERNEL_LIST"
_reshape_and_cache = auto_generate.ReshapeAndCache()


def obstacle(config, dtype):
    """Why paged attention cannot serve a model of this dtype, or None."""
    if dtype not in (ms.float16, ms.bfloat16):
        return f"paged attention takes float16 and bfloat16, not {str(dtype).lower()}"
    if config.head_dim % 16 or config.head_dim > LARGEST_HEAD:
        return f"paged attention takes heads of a multiple of 16 up to {LARGEST_HEAD}, not {config.head_dim}"
    if config.n_head // config.num_key_value_heads > LARGEST_GROUP:
        return (f"paged attention takes up to {LARGEST_GROUP} heads for a key-value head, not "
                f"{config.n_head // config.num_key_value_heads}")
    if config.position_embedding == "alibi":
        return "PagedAttention takes no ALiBi"
    if "PagedAttention" in os.environ.get(_SWITCHED_OFF, "").split(","):
        return f"{_SWITCHED_OFF} names PagedAttention, and the kernel that is left takes its lengths from the host: unset it"
    return None


def block_size(head_dim):
    """Tokens of a block: `USUAL_BLOCK`, or the largest power of two for which a block is not too large."""
    size = USUAL_BLOCK
    while size * head_dim > LARGEST_BLOCK:
        size //= 2
    return size


def write_cache(key_cache, value_cache, key, value, places):
    """ReshapeAndCache: key and value (N, m·D) into caches (blocks, block size, m, D), at int32 ``places`` (N,)."""
    _check_cache(key_cache.shape, value_cache.shape, key_cache.dtype)
    _check_written(key.shape, value.shape, key.dtype, places.shape, places.dtype, key_cache.shape, key_cache.dtype)
    return _reshape_and_cache(key, value, key_cache, value_cache, places)


def paged_attention(query, key_cache, value_cache, table, lengths, scale):
    """softmax(scale·query·keyᵀ)·value over the first ``lengths`` tokens of each sequence's blocks.

    Args:
        query (Tensor): (B, n·D), float16 or bfloat16; n a multiple of m.
        key_cache, value_cache (Tensor): (blocks, block size, m, D) in query's dtype.
        table (Tensor): int32 (B, blocks of a sequence), which blocks hold it, in order.
        lengths (Tensor): int32 (B,), in a graph an argument called batch_valid_length. The kernel reads it on the card.
        scale (float): usually D^(−1/2).

    Returns:
        Tensor: (B, n·D).

    Raises:
        InputError: an argument is wrong; the message names it.
    """
    _check_cache(key_cache.shape, value_cache.shape, key_cache.dtype)
    _check_query(query.shape, query.dtype, table.shape, table.dtype, lengths.shape, lengths.dtype, key_cache.shape,
                 key_cache.dtype)
    kv_heads, dim = key_cache.shape[2], key_cache.shape[3]
    width = query.shape[1]
    operation = auto_generate.PagedAttention(width // dim, scale, kv_heads)
    # In two dimensions queries go to another kernel, which is taken only where the environment switches this one off.
    return operation(query.reshape(-1, 1, width), key_cache, value_cache, table, lengths).reshape(-1, width)


def _refuse(argument, what):
    raise InputError(f"paged attention: {argument} {what}")


@ops.constexpr
def _check_cache(keys, values, dtype):
    if len(keys) != 4:
        _refuse("key_cache", f"must be (blocks, block size, heads, head size), not {tuple(keys)}")
    if tuple(values) != tuple(keys):
        _refuse("value_cache", f"must have key_cache's shape {tuple(keys)}, not {tuple(values)}")
    if dtype not in (ms.float16, ms.bfloat16):
        _refuse("key_cache", f"must be float16 or bfloat16, not {dtype}")
    _, size, _, dim = keys
    if dim % 16 or dim > LARGEST_HEAD:
        _refuse("key_cache", f"must have heads of a multiple of 16 up to {LARGEST_HEAD}, not {dim}")
    if size * dim > LARGEST_BLOCK:
        _refuse("key_cache", f"must have blocks of at most {LARGEST_BLOCK // dim} tokens for heads of {dim}, not {size}")
    if size not in BLOCKS:
        _refuse("key_cache", f"must have blocks of {', '.join(map(str, BLOCKS))} tokens, not {size}")


@ops.constexpr
def _check_written(key, value, dtype, places, places_dtype, cache, cache_dtype):
    if dtype != cache_dtype:
        _refuse("key", f"must be {cache_dtype} as the cache is, not {dtype}")
    if len(key) != 2 or key[1] != cache[2] * cache[3]:
        _refuse("key", f"must be (tokens, {cache[2] * cache[3]}), not {tuple(key)}")
    if tuple(value) != tuple(key):
        _refuse("value", f"must have key's shape {tuple(key)}, not {tuple(value)}")
    if key[0] > cache[0] * cache[1]:
        _refuse("key", f"must have no more tokens than the cache's {cache[0] * cache[1]}, not {key[0]}")
    if places_dtype != ms.int32 or tuple(places) != (key[0],):
        _refuse("places", f"must be int32 {(key[0],)}, not {places_dtype} {tuple(places)}")


@ops.constexpr
def _check_query(query, dtype, table, table_dtype, lengths, lengths_dtype, cache, cache_dtype):
    if dtype != cache_dtype:
        _refuse("query", f"must be {cache_dtype} as the cache is, not {dtype}")
    if len(query) != 2 or query[1] % cache[3] or query[1] // cache[3] % cache[2]:
        _refuse("query", f"must be (sequences, n·{cache[3]}), n a multiple of {cache[2]}, not {tuple(query)}")
    if query[1] // cache[3] // cache[2] > LARGEST_GROUP:
        _refuse("query", f"must have at most {LARGEST_GROUP} heads for each of the cache's, not "
                         f"{query[1] // cache[3] // cache[2]}")
    if table_dtype != ms.int32 or len(table) != 2 or table[0] != query[0]:
        _refuse("table", f"must be int32 ({query[0]}, blocks), not {table_dtype} {tuple(table)}")
    if lengths_dtype != ms.int32 or tuple(lengths) != (query[0],):
        _refuse("lengths", f"must be int32 {(query[0],)}, not {lengths_dtype} {tuple(lengths)}")
