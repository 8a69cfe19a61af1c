"""Where each sequence's tokens lie in a key-value cache that is cut into blocks.

Kwon et al., "PagedAttention" (arXiv:2309.06180): a sequence takes a block when it has filled the
last one, from wherever one is free, and a table says which blocks are its own, in order.
"""

import numpy as np


class BlockTable:
    """Blocks of ``block_size`` tokens for ``slots`` sequences of up to ``length`` tokens.

    Attributes:
        count: blocks of the cache.
        table: int32 (slots, blocks a sequence), the blocks of each sequence; 0 where it has none yet.
    """

    def __init__(self, slots, length, block_size):
        self.block_size = block_size
        most = -(-length // block_size)
        self.count = slots * most
        self.table = np.zeros((slots, most), np.int32)
        self._held = [0] * slots
        self._free = list(range(self.count))[::-1]

    def clear(self, slot):
        """Give back the blocks of a sequence that has ended."""
        held = self._held[slot]
        self._free += [int(block) for block in self.table[slot, :held][::-1]]
        self.table[slot] = 0
        self._held[slot] = 0

    def grow(self, slot, length):
        """Give a sequence the blocks that ``length`` tokens need."""
        while self._held[slot] * self.block_size < length:
            self.table[slot, self._held[slot]] = self._free.pop()
            self._held[slot] += 1

    def places(self, slot, positions):
        """Places in the cache, block · block_size + offset, of positions of a sequence: int32, their shape."""
        positions = np.asarray(positions)
        blocks = self.table[slot, positions // self.block_size]
        return (blocks * self.block_size + positions % self.block_size).astype(np.int32)
