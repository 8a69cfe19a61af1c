"""The kernels' half that generation alone uses: keys and values in a cache in blocks, how they are written and read.

Behind it are PagedAttention (ascend_kernels.py) and operations that every device has (cached_attention.py); those of our
own for CPUs are in cpu/kernels.py.
"""

import numpy as np
from mindspore import Tensor, nn, ops

from telechat.nn import ascend_kernels as ascend
from telechat.nn import cached_attention as cached
from telechat.nn import portable_kernels as portable
from telechat.nn.device import device_tensor


class CacheKernels(nn.Cell):
    """What `Kernels` is made from: it has the heads' layout (`split_heads`, `merge_heads`) from there.

    Args:
        dtype: of the activations.
        flash (bool): heads lie as (B, S, heads, D), else as (B, heads, S, D).
        paged (bool): ReshapeAndCache and PagedAttention.
    """

    def __init__(self, dtype, flash, paged):
        super().__init__()
        self.dtype = dtype
        self.flash = flash
        self.paged = paged

    def cache_shape(self, blocks, size, heads, dim):
        """Shape of a layer's cache of keys, or of values: some blocks of ``size`` tokens with heads of size dim."""
        return (blocks, size, heads, dim) if self.paged else (blocks, heads, size, dim)

    def cache_view(self, cache):
        """A cache's memory as what is written to: by rows, (all tokens' heads, dim), unless ``paged``. Outside graphs only."""
        return cache if self.paged else cache.view(-1, cache.shape[-1])

    def cache_index(self, places, heads, size):
        """Where `write_cache` puts tokens: an int32 Tensor for `BlockTable.places` (B, S), blocks of ``size``."""
        return Tensor(places.reshape(-1).astype(np.int32) if self.paged else cached.cache_rows(places, heads, size))

    def write_cache(self, key_cache, value_cache, key, value, index):
        """Write keys and values of m heads, as `split_heads` gives them, to their places in views of `cache_view`.

        index: of `cache_index`. Returns something to depend on.
        """
        if self.paged:
            return ascend.write_cache(key_cache, value_cache, self.merge_heads(key), self.merge_heads(value), index)
        if self.flash:  # heads lie as (B, S, m, D), rows of the cache by head
            key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
        return cached.write_cache(key_cache, value_cache, key, value, index)

    def chunk_tensors(self, config, positions, length, heads=slice(None)):
        """What `attention_over_cache` needs to know of tokens in the midst of their sequences, in two parts.

        Args:
            config (TeleChatConfig): position bias and number of heads.
            positions (array): int (B, S), of the tokens.
            length (int): T, the tokens that the blocks given to it hold.
            heads (slice): the heads computed here.

        Returns:
            (mask, shift): portable: `chunk_mask` and None; flash: uint8 (B, 1, S, T), 1 hides, and ALiBi's bias.
        """
        mask = cached.chunk_mask(config, positions, length, heads)
        if not self.flash:
            return device_tensor(mask), None
        shift = device_tensor(np.maximum(mask, -1e4), self.dtype) if config.position_embedding == "alibi" else None
        return device_tensor((positions[:, None, :, None] < np.arange(length)).astype(np.uint8)), shift

    def attention_over_cache(self, query, keys, values, written, table, mask, shift, scale):
        """Attention of some tokens of each sequence to all before them and to each other, once they are in the cache.

        Args:
            query (Tensor): n heads as `split_heads` gives them.
            keys, values (Tensor): of a layer's cache, as `cache_shape` says.
            written: of `write_cache`.
            table (Tensor): int32 (B, blocks), which blocks hold each sequence.
            mask, shift: of `chunk_tensors`.
            scale (float): usually D^(−1/2).

        Returns:
            Tensor: query's shape and dtype; without gradient.
        """
        keys, values = self.read_cache(keys, written, table), self.read_cache(values, written, table)
        if self.flash:
            return ascend.attention(query, keys, values, mask, shift, None, scale, None, 1.0)
        return portable.attention(query, keys, values, mask, scale)

    def read_cache(self, cache, written, table):
        """The blocks of each sequence in a row, as `attention` takes heads, once ``written`` is done."""
        cache = ops.depend(cache, written)
        if not self.paged:
            heads = cached.read_cache(cache, table)
            return heads.transpose(0, 2, 1, 3) if self.flash else heads
        blocks = ops.gather(cache, table, 0)
        heads = blocks.reshape(table.shape[0], -1, *cache.shape[2:])
        return heads if self.flash else heads.transpose(0, 2, 1, 3)

    def decoding_places(self, positions, index, table, lengths, slopes, size):
        """What `cached_attention` needs to know of one new token a sequence, the same for all layers.

        positions int32 (B,); index: of `cache_index`; table int32 (B, blocks) and the sequences' lengths with the new
        token, as `paged_attention` takes them; ALiBi's slopes (1, n, 1, 1) or None; tokens of a block.
        """
        if self.paged:
            return index, table, lengths
        return cached.decoding_places(positions, index, table, slopes, size)

    def cached_attention(self, query, key_value, rotation, caches, places, scale):
        """Write one new token a sequence to the cache and attend to all of the sequence.

        query (B, n·D); key_value (B, m·2D), [k|v] head by head; rotation: cos and sin (B, D), None for
        none; caches: views of keys and of values to write to, and the same two to read; places: of
        `decoding_places`. Returns (B, n·D). Without gradient.
        """
        attend = ascend.cached_attention if self.paged else cached.cached_attention
        return attend(query, key_value, rotation, caches, places, scale)

    def decode_step(self, config, slopes, shared=None):
        """An operator for a whole model or a process's part of it: a `DecodeStep` of these arguments; None for none."""
        return None

    def shared_bytes(self, processes):
        """Bytes of the memory that `decode_step` needs to be shared by so many processes; 0 where it gives none."""
        return 0
