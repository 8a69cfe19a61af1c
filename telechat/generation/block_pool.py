"""The blocks of a key-value cache: handed out, taken back, shared, and remembered by the tokens they hold.

Kwon et al., "PagedAttention" (arXiv:2309.06180). A block that is full is known by its tokens and those before them: a
sequence that begins with the same tokens shares it instead of computing it. One that is not full is known in the same way
when its sequence has ended, and goes to the next one that goes on from there, as the turns of a chat do. What nobody uses any
more is kept until room is needed, and the least recently used goes first. All is decided by the calls, in their order: processes that
share a model make the same calls and hold the same blocks.
"""

import collections

UNREAD = 0  # the block that what nothing will read is written to; never handed out


class BlockPool:
    """Blocks 1 … ``count`` of a cache; block 0 is `UNREAD`.

    Args:
        count (int): blocks to hand out.
        reuse (bool): whether full blocks are remembered.

    Attributes:
        evictions (int): how many remembered blocks were given up for others.
    """

    def __init__(self, count, reuse=True):
        self.count = count
        self.reuse = reuse
        self.evictions = 0
        self._free = list(range(count, 0, -1))
        self._users = [0] * (count + 1)
        self._idle = collections.OrderedDict()  # remembered blocks that nobody uses, the longest unused first
        self._known = {}  # (what comes before: a key of `remember`'s, these tokens) → block
        self._key = {}  # remembered block → its key in `_known`
        self._number = {}  # remembered block → a number that no other block ever had
        self._numbers = 0
        self._tails = {}  # what comes before → (block, its first tokens), of blocks that are not full and that nobody uses
        self._tail_key = {}  # such a block → its key in `_tails`

    @property
    def available(self):
        """How many blocks can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def remembered(self):
        """How many blocks are known by their tokens."""
        return len(self._key)

    def take(self):
        """A block for one user; `available` says whether there is one."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
            self.evictions += 1
        self._users[block] = 1
        return block

    def release(self, block):
        """One user less."""
        self._users[block] -= 1
        if self._users[block] == 0:
            if block in self._key:
                self._idle[block] = None
            else:
                self._free.append(block)

    def release_tail(self, block, before, tokens):
        """A block's only user has ended, and its first ``tokens`` are computed: `take_tail` will find it."""
        if not (self.reuse and tokens):
            return self.release(block)
        if before in self._tails:  # the newest one is the likeliest to go on
            old, _ = self._tails[before]
            self._forget(old)
            del self._idle[old]
            self._free.append(old)
        self._users[block] = 0
        self._idle[block] = None
        self._tails[before], self._tail_key[block] = (block, tokens), before

    def find_tail(self, before, tokens):
        """How many of ``tokens`` behind ``before`` are the first ones of a block that is not full."""
        _, known = self._tails.get(before, (None, ()))
        return next((place for place, (one, other) in enumerate(zip(known, tokens)) if one != other), min(len(known), len(tokens)))

    def take_tail(self, before):
        """The block that `find_tail` found, for one user, who goes on in it."""
        block, _ = self._tails[before]
        self._forget(block)
        del self._idle[block]
        self._users[block] = 1
        return block

    def share(self, block):
        """One user more of a block that `find` gave."""
        self._idle.pop(block, None)
        self._users[block] += 1

    def find(self, before, tokens):
        """The block that holds ``tokens`` behind ``before``, or None.

        Args:
            before (hashable): what `name` says of the block before; of a sequence's first block, all that its keys
                depend on besides the tokens.
            tokens (tuple of int): a block's.
        """
        return self._known.get((before, tokens))

    def name(self, block):
        """What stands for a remembered block and all before it."""
        return self._number[block]

    def remember(self, block, before, tokens):
        """A block is full of ``tokens`` behind ``before``; where another one is known for them, that one stays it.

        Returns:
            int: the name of the block that is known; None where nothing is remembered.
        """
        if not self.reuse:
            return None
        known = self._known.setdefault((before, tokens), block)
        if known == block and block not in self._key:
            self._key[block] = before, tokens
            self._numbers += 1
            self._number[block] = self._numbers
        return self._number[known]

    def is_used(self, block):
        """Whether anybody holds a block; one that is not will be taken back when room is needed."""
        return self._users[block] > 0

    def forget_all(self):
        """Remember nothing any more: what was computed is out of date. Blocks in use stay their users'."""
        self._free += reversed(self._idle)
        self._idle.clear()
        for known in (self._known, self._key, self._number, self._tails, self._tail_key):
            known.clear()

    def _forget(self, block):
        if block in self._tail_key:
            del self._tails[self._tail_key.pop(block)]
        else:
            del self._known[self._key.pop(block)]
            del self._number[block]
