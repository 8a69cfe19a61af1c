"""The memory of a key-value cache: tensors of all layers, cut into blocks, and the table of who holds which."""

from telechat.generation.block_table import BlockTable
from telechat.nn.device import device_zeros
from telechat.nn.paged_attention import block_size

TOKENS = 16  # of a block, where the kernels take any number of whole vectors: what begins alike is shared in steps of so many


def tokens_of_block(kernels, config):
    """How many tokens a block of the cache holds."""
    return block_size(config.head_dim) if kernels.paged else TOKENS


class KeyValueCache:
    """Keys and values of some sequences.

    Args:
        model (TeleChat or TensorParallelModel): whose they are.
        slots, length (int): sequences, and tokens of each, at most.
        blocks (int): of the cache; None: as many as all sequences can fill.
        reuse (bool): whether sequences that begin alike share blocks.

    Attributes:
        table (BlockTable): which blocks hold each sequence.
        layers: for each layer views of keys and of values to write to, and the same two to read.
    """

    def __init__(self, model, slots, length, blocks=None, reuse=True):
        config, kernels = model.config, model.kernels
        heads = model.transformer.h[0].functions.key_value_heads
        self.table = BlockTable(slots, length, tokens_of_block(kernels, config), blocks, reuse)
        self.layers = []
        # One more block, which takes what nothing will read.
        shape = kernels.cache_shape(self.table.pool.count + 1, self.table.block_size, heads, config.head_dim)
        for _ in range(config.n_layer):
            caches = [device_zeros(shape, model.compute_dtype) for _ in range(2)]
            self.layers.append([*map(kernels.cache_view, caches), *caches])
