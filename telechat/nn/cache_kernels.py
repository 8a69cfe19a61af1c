"""The kernels' half that generation alone uses: keys and values in a cache in blocks, how they are written and read.

By operations that every device has (cached_attention.py); PagedAttention is in ascend.py, operators of our own
for CPUs in cpu/kernels.py.
"""

from mindspore import Tensor, nn, ops

from telechat.nn import cached_attention as cached
from telechat.nn import portable_kernels as portable
from telechat.nn.device import device_tensor


class CacheKernels(nn.Cell):
    """What `Kernels` is made from: it has the heads' layout (`split_heads`, `merge_heads`) from there.

    dtype: of the activations. flash, paged: as of `Kernels`.
    """

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype
        self.flash = self.paged = False

    def cache_shape(self, blocks, size, heads, dim):
        """Shape of a layer's cache of keys, or of values: some blocks of ``size`` tokens with heads of size dim."""
        return blocks, heads, size, dim

    def cache_view(self, cache):
        """A cache's memory as what is written to: by rows, (all tokens' heads, dim), unless ``paged``. Outside graphs only."""
        return cache.view(-1, cache.shape[-1])

    def cache_index(self, places, heads, size):
        """Where `write_cache` puts tokens: an int32 Tensor for `BlockTable.places` (B, S), blocks of ``size``."""
        return Tensor(cached.cache_rows(places, heads, size))

    def write_cache(self, key_cache, value_cache, key, value, index):
        """Write keys and values of m heads, as `split_heads` gives them, to their places in views of `cache_view`.

        index: of `cache_index`. Returns something to depend on.
        """
        return cached.write_cache(key_cache, value_cache, key, value, index)

    def chunk_tensors(self, config, positions, length, heads=slice(None)):
        """What `attention_over_cache` needs to know of tokens in the midst of their sequences, in two parts.

        Args:
            config (TeleChatConfig): position bias and number of heads.
            positions (array): int (B, S), of the tokens.
            length (int): T, the tokens that the blocks given to it hold.
            heads (slice): the heads computed here.

        Returns:
            (mask, position_bias): portable: `chunk_mask` and None; flash: uint8 (B, 1, S, T), 1 hides, and ALiBi's bias.
        """
        return device_tensor(cached.chunk_mask(config, positions, length, heads)), None

    def attention_over_cache(self, query, keys, values, written, table, mask, position_bias, scale):
        """Attention of some tokens of each sequence to all before them and to each other, once they are in the cache.

        Args:
            query (Tensor): n heads as `split_heads` gives them.
            keys, values (Tensor): of a layer's cache, as `cache_shape` says.
            written: of `write_cache`.
            table (Tensor): int32 (B, blocks), which blocks hold each sequence.
            mask, position_bias: of `chunk_tensors`.
            scale (float): usually D^(−1/2).

        Returns:
            Tensor: query's shape and dtype; without gradient.
        """
        keys, values = self.read_cache(keys, written, table), self.read_cache(values, written, table)
        return portable.attention(query, keys, values, mask, scale)

    def read_cache(self, cache, written, table):
        """The blocks of each sequence in a row, (B, m, T, D), once ``written`` is done."""
        return cached.read_cache(ops.depend(cache, written), table)

    def decoding_places(self, positions, index, table, lengths, slopes, size):
        """What `cached_attention` needs to know of one new token a sequence, the same for all layers.

        positions int32 (B,); index: of `cache_index`; table int32 (B, blocks) and the sequences' lengths with the new
        token, as `paged_attention` takes them; ALiBi's slopes (1, n, 1, 1) or None; tokens of a block.
        """
        return cached.decoding_places(positions, index, table, slopes, size)

    def cached_attention(self, query, key_value, rotation, caches, places, scale):
        """Write one new token a sequence to the cache and attend to all of the sequence.

        query (B, n·D); key_value (B, m·2D), [k|v] head by head; rotation: cos and sin (B, D), None for
        none; caches: views of keys and of values to write to, and the same two to read; places: of
        `decoding_places`. Returns (B, n·D). Without gradient.
        """
        return cached.cached_attention(query, key_value, rotation, caches, places, scale)

    def decode_step(self, config, slopes, shared=None):
        """An operator for a whole model or a process's part of it: a `DecodeStep` of these arguments; None for none."""
        return None

    def shared_bytes(self, processes):
        """Bytes of the memory that `decode_step` needs to be shared by so many processes; 0 where it gives none."""
        return 0
