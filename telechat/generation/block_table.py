"""Which blocks of a key-value cache hold each running sequence, in order."""

import math

import numpy as np

from telechat.generation.block_pool import UNREAD, BlockPool


class BlockTable:
    """Blocks of ``block_size`` tokens for ``slots`` sequences of up to ``length`` tokens.

    Args:
        slots, length, block_size (int): how many sequences, their most tokens, tokens of a block.
        count (int): blocks of the cache; None: as many as all the sequences can fill.
        reuse (bool): whether sequences that begin alike share blocks.

    Attributes:
        pool (BlockPool): hands them out.
        table: int32 (slots, blocks a sequence), the blocks of each sequence; `UNREAD` where it has none yet.
        hits, misses (int): tokens of prompts that were found in the cache, and that were not.
    """

    def __init__(self, slots, length, block_size, count=None, reuse=True):
        self.block_size = block_size
        most = -(-length // block_size)
        self.pool = BlockPool(slots * most if count is None else count, reuse)
        self.table = np.full((slots, most), UNREAD, np.int32)
        self.hits = self.misses = 0
        self._held = [0] * slots
        self._named = [()] * slots  # the names of a sequence's full blocks that are remembered, in order
        self._tail = [()] * slots  # the tokens behind these that are computed
        self._root = [None] * slots
        self._shareable = [0] * slots  # tokens up to which blocks may be remembered

    def begin(self, slot, ids, root=None, shareable=math.inf):
        """Start a sequence in a slot with the blocks that are known of it.

        Args:
            ids (list of int): its tokens; the last one is always left to be computed.
            root (hashable): what keys depend on besides the tokens before.
            shareable (int): the tokens up to which they depend on nothing else.

        Returns:
            int: of how many tokens the cache holds keys and values.
        """
        self.clear(slot)
        self._root[slot], self._shareable[slot] = root, shareable
        names = []
        for block in self._known_blocks(ids, root, shareable):
            self.pool.share(block)
            self.table[slot, len(names)] = block
            names.append(self.pool.name(block))
        found = len(names) * self.block_size
        tail = self._known_tail(ids, names, root, shareable)
        if tail:
            self.table[slot, len(names)] = self.pool.take_tail(names[-1] if names else root)
            self._tail[slot] = tuple(ids[found:found + tail])
        self._named[slot], self._held[slot] = names, len(names) + (tail > 0)
        found += tail
        self.hits += found
        self.misses += len(ids) - found
        return found

    def needed(self, ids, root=None, shareable=math.inf):
        """What a sequence that is not in a slot would take; arguments as of `begin`.

        Returns:
            (int, int, tuple): of the blocks that can be taken now, how many; how many of its tokens are known; and
            what `next_block` would say of it.
        """
        known = list(self._known_blocks(ids, root, shareable))
        used = sum(map(self.pool.is_used, known))
        names = [self.pool.name(block) for block in known]
        found = len(known) * self.block_size + self._known_tail(ids, names, root, shareable)
        return (-(-len(ids) // self.block_size) - used, found, self._next_block(ids, names, root, shareable))

    def next_block(self, slot, ids):
        """The first block of a running sequence that is not known: (name of what is before, its tokens).

        Sequences that wait for the same one are best computed one after the other. None where it will not be shared.
        """
        return self._next_block(ids, self._named[slot], self._root[slot], self._shareable[slot])

    def _next_block(self, ids, names, root, shareable):
        first = len(names) * self.block_size
        if not self.pool.reuse or first + self.block_size > min(len(ids), shareable):
            return None
        return names[-1] if names else root, tuple(ids[first:first + self.block_size])

    def _known_blocks(self, ids, root, shareable):
        before, size = root, self.block_size
        for first in range(0, min(len(ids) - 1, shareable) // size * size if self.pool.reuse else 0, size):
            block = self.pool.find(before, tuple(ids[first:first + size]))
            if block is None:
                return
            yield block
            before = self.pool.name(block)

    def _known_tail(self, ids, names, root, shareable):
        """How many tokens behind the known blocks the next block holds, all but the last of a sequence at most."""
        first = len(names) * self.block_size
        last = min(len(ids) - 1, shareable, first + self.block_size)
        return self.pool.find_tail(names[-1] if names else root, ids[first:last]) if last > first else 0

    def grow(self, slot, length):
        """Give a sequence the blocks that ``length`` tokens need; False, and nothing, where there are not enough."""
        missing = self.missing(slot, length)
        if missing > self.pool.available:
            return False
        for _ in range(missing):
            self.table[slot, self._held[slot]] = self.pool.take()
            self._held[slot] += 1
        return True

    def missing(self, slot, length):
        """How many more blocks a sequence takes before it has ``length`` tokens."""
        return max(-(-length // self.block_size) - self._held[slot], 0)

    def lacks(self, slot, length):
        """Whether a sequence will take more blocks before it has ``length`` tokens."""
        return self.missing(slot, length) > 0

    def remember(self, slot, ids, count):
        """The first ``count`` of a sequence's tokens ``ids`` are computed: their full blocks may be shared, and the last one
        when the sequence has ended."""
        names, size = self._named[slot], self.block_size
        while self.pool.reuse and (len(names) + 1) * size <= min(count, self._shareable[slot]):
            number = len(names)
            tokens = tuple(ids[number * size:(number + 1) * size])
            names.append(self.pool.remember(int(self.table[slot, number]), names[-1] if names else self._root[slot], tokens))
        if self.pool.reuse:
            self._tail[slot] = tuple(ids[len(names) * size:min(count, self._shareable[slot])])

    def clear(self, slot):
        """Give back the blocks of a sequence that has ended, the last one first: it will be the first to be taken."""
        names = self._named[slot]
        for number in reversed(range(self._held[slot])):
            block = int(self.table[slot, number])
            if number == len(names) and self._tail[slot]:
                self.pool.release_tail(block, names[-1] if names else self._root[slot], self._tail[slot])
            else:
                self.pool.release(block)
        self.table[slot] = UNREAD
        self._held[slot], self._named[slot], self._tail[slot] = 0, [], ()

    def forget_all(self):
        """What the blocks hold is out of date; to be called while no sequence runs."""
        self.pool.forget_all()

    def places(self, slot, positions):
        """Places in the cache, block · block_size + offset, of positions of a sequence: int32, their shape.

        slot (int or array): one for all positions, or one for each.
        """
        positions = np.asarray(positions)
        blocks = self.table[slot, positions // self.block_size]
        return (blocks * self.block_size + positions % self.block_size).astype(np.int32)
