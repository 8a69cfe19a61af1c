"""Sequences through a model with a key-value cache: prompts, in one go or in parts, and one token after another.

Every running sequence has a slot, and takes blocks of the cache as it grows. Positions count from 0 in each, and what
a sequence computes does not depend on its neighbours; by the operators for CPUs not in one bit, by graphs but for the
last bits of products, which may depend on how many rows there are.
"""

import math

import numpy as np

from telechat.generation.cache import KeyValueCache, tokens_of_block
from telechat.generation.graph_steps import SMALLEST_CACHE, SMALLEST_PREFILL, GraphSteps, bucket
from telechat.generation.operator_steps import OperatorSteps
from telechat.nn.alibi import alibi_slopes
from telechat.nn.positions import decoding_tables, token_tables
from telechat.nn.rotary import fixed_tables_length


class Engine:
    """One model and the cache of the sequences that run.

    A caller gives a sequence a slot with `begin`, room with `grow`, reads its prompt with `prefill`, goes on with `decode`,
    and says with `remember` what others may share, until `end`.

    Args:
        model (TeleChat or TensorParallelModel): the model.
        max_length (int): the longest sequence, prompt and answer together.
        reuse (bool): whether sequences that begin with the same tokens share what the cache holds of them.
        guesses (int): how many tokens more than one `decode` is to take of a sequence.
        adapters (AdapterSet): LoRA adapters that sequences may have, each its own; None: none.

    Attributes:
        slots, length (int): how many sequences run at a time, and the tokens of one, at most; of `reserve`.
    """

    def __init__(self, model, max_length, reuse=True, guesses=0, adapters=None):
        self.model = model
        self.max_length = max_length
        self.reuse = reuse
        self.slots = self.length = 0
        self._reserved = None
        self._cache = None
        self._prompts = []  # the length of each slot's prompt
        self._adapters = adapters
        self._adapter_of = []  # each slot's, by name
        config, functions = model.config, model.transformer.h[0].functions
        self._fixed = fixed_tables_length(config) if functions.rotary else math.inf
        self._tables = decoding_tables(config, max_length) if functions.rotary else None
        step = None
        if not functions.is_tensor_parallel or model.shared is not None:
            slopes = None if functions.rotary else alibi_slopes(config.n_head)[model.own_heads]
            step = model.kernels.decode_step(config, slopes, model.shared)
        self._steps = (GraphSteps(model, max_length, 1 + guesses, adapters) if step is None
                       else OperatorSteps(model, step, self._tables, adapters))

    def reserve(self, slots, length, blocks=None):
        """Make room for ``slots`` sequences of up to ``length`` tokens; unless there is just that, what was held is lost.

        Args:
            blocks (int): of the cache, which the sequences share; None: as many as all of them can fill.
        """
        most = bucket(length, SMALLEST_CACHE, self.max_length)
        if self._reserved != (slots, most, blocks):
            self.model.kernels.require_device()
            self._cache = None  # freed before the new one is made
            self._steps.use(None)
            self._cache = KeyValueCache(self.model, slots, most, blocks, self.reuse)
            self._steps.use(self._cache)
            self.slots, self._prompts, self._adapter_of = slots, [0] * slots, [None] * slots
            self.length = min(most, self.table.pool.count * self.table.block_size)
            self._reserved = slots, most, blocks

    @property
    def table(self):
        """The `BlockTable`: what is held, shared and free."""
        return self._cache.table

    @property
    def block_size(self):
        """Tokens of a block of the cache."""
        return tokens_of_block(self.model.kernels, self.model.config)

    @property
    def available(self):
        """How many blocks can be taken."""
        return self.table.pool.available

    def forget(self):
        """Share nothing of what was computed so far: the weights have changed."""
        if self._cache is not None:
            self.table.forget_all()

    def begin(self, slot, ids, prompt_length=None, adapter=None):
        """Give a sequence a slot: the number of its tokens that the cache holds already, less than there are.

        Args:
            ids (list of int): its tokens so far.
            prompt_length (int): how many of them are its prompt; None: all.
            adapter (str): the name of its adapter; None: none.
        """
        self._prompts[slot], self._adapter_of[slot] = prompt_length or len(ids), adapter
        return self.table.begin(slot, ids, *self._sharing(self._prompts[slot], adapter))

    def needed(self, ids, prompt_length, adapter=None):
        """What `BlockTable.needed` says of a sequence that is to begin."""
        return self.table.needed(ids, *self._sharing(prompt_length, adapter))

    def next_block(self, slot, ids):
        """What `BlockTable.next_block` says of a running sequence."""
        return self.table.next_block(slot, ids)

    def _sharing(self, prompt_length, adapter):
        """What keys depend on besides tokens before, and the tokens up to which they depend on nothing else.

        Past the length up to which rotary tables are fixed, a prompt's are those of its length, and those of an answer's
        tokens those of their own.
        """
        if prompt_length <= self._fixed:
            return (adapter, None), self._fixed
        return (adapter, prompt_length), prompt_length

    def grow(self, slot, length):
        """Make room for ``length`` tokens of a sequence; False, and nothing, where the cache has not enough."""
        return self.table.grow(slot, length)

    def remember(self, slot, ids, count):
        """The first ``count`` of a sequence's tokens ``ids`` are in the cache: others may share them."""
        self.table.remember(slot, ids, count)

    def end(self, slot):
        """Take back what a sequence holds."""
        self.table.clear(slot)

    def takes_together(self, counts):
        """Whether one call of `prefill` for parts of so many tokens takes less time than one for each."""
        return self._steps.takes_together(counts)

    def prefill(self, slots, prompts, starts=None):
        """Read prompts, or parts of them: float32 logits (N, V) of the tokens that follow.

        Args:
            slots (list of int): where sequences were begun that have room for all these tokens.
            prompts (list of lists of int): token ids.
            starts (list of int): the position of each one's first token, what is before being in the cache; None: the
                prompts are whole, and begin in these slots here.
        """
        slots = list(slots)
        if starts is None:
            starts = [0] * len(slots)
            for slot, prompt in zip(slots, prompts):
                self.end(slot)
                self._prompts[slot], self._adapter_of[slot] = len(prompt), None
                self._require(slot, len(prompt))
        rotations = [None if self._tables is None else
                     token_tables(self.model.config, self._tables, start, len(prompt), self._prompts[slot])
                     for slot, prompt, start in zip(slots, prompts, starts)]
        return self._steps.prefill(slots, prompts, starts, rotations, self._columns(slots))

    def decode(self, slots, tokens, positions):
        """One more token of each sequence: its id and position → float32 logits (N, V) of what follows.

        A slot may stand there several times in a row, with tokens that follow each other: each sees those before it. What
        is decoded again at a position takes the place of what was there.
        """
        for slot, position in zip(slots, positions):
            self._require(slot, position + 1)
        return self._steps.decode(slots, tokens, positions, self._columns(slots))

    def _columns(self, slots):
        """`AdapterSet.columns` of some slots."""
        return None if self._adapters is None else self._adapters.columns([self._adapter_of[slot] for slot in slots])

    def extend(self, slots, tokens, positions):
        """Some tokens of each sequence, that may turn out to be wrong: logits behind each of them.

        Args:
            slots (list of int): where sequences run.
            tokens (list of lists of int): ids that follow each other in each sequence, its newest token first.
            positions (list of int): of each one's first token.

        Returns:
            list of arrays: float32 (tokens, V) for each sequence.
        """
        rows = [(slot, token, start + place) for slot, ids, start in zip(slots, tokens, positions)
                for place, token in enumerate(ids)]
        logits = self.decode(*map(list, zip(*rows)))
        return np.split(logits, np.cumsum([len(ids) for ids in tokens])[:-1])

    def _require(self, slot, length):
        if not self.grow(slot, length):
            raise RuntimeError(f"the cache has no block left for token {length} of slot {slot}")

    @property
    def uncompiled(self):
        """Batch sizes of `decode` whose graphs have not been needed yet."""
        return list(self._steps.uncompiled)

    def compile(self, size):
        """Compile decoding for a batch of ``size``; no sequence may run."""
        slots = sorted(row % min(self.slots, self.available) for row in range(size))  # a token each takes a block each
        for adapter in (None,) if self._adapters is None else (None, self._adapters.names[0]):
            self._adapter_of = [adapter] * self.slots
            self.decode(slots, [0] * size, [0] * size)
        self._adapter_of = [None] * self.slots
        for slot in set(slots):
            self.end(slot)

    def warm_up(self, longest):
        """Compile what a first request would wait for: decoding, and prompts of up to ``longest`` tokens."""
        if not self.uncompiled:
            return
        size = SMALLEST_PREFILL
        while size <= min(longest, self.length):
            self.prefill([0], [[0] * size])
            self.end(0)
            size *= 2
        for size in {1, self.slots, max(self.uncompiled)}:  # what is between follows while nobody waits
            self.compile(size)
