"""Prefill and decode with a key-value cache: the compiled part of generation.

Every sequence has a slot. Prompts are prefilled into any of them, so a slot may be refilled while others
go on; decoding advances some slots by a token in one graph, compiled for batch sizes of powers of two.
Positions count from 0 in each slot, and what a slot computes does not depend on its neighbours, but for
the last bits of products, which may depend on how many there are.
"""

import collections
import contextlib
import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from telechat.checkpoint.layout import parameter_shapes
from telechat.generation.block_table import BlockTable
from telechat.nn.alibi import alibi_slopes
from telechat.nn.block import OF_ATTENTION
from telechat.nn.block_graphs import FeedForward
from telechat.nn.device import device_tensor, device_zeros
from telechat.nn.long_attention import Pieces
from telechat.nn.long_block import LongPrefillAttention
from telechat.nn.paged_attention import block_size
from telechat.nn.positions import decoding_tables
from telechat.nn.rotary import rotary_tables
from telechat.progress import Progress, track

SMALLEST_PREFILL = 32
SMALLEST_CACHE = 128
ROWS_TOGETHER = 1024  # of prompts that are prefilled in one call: with more, products take most of the time
LAYERS_A_GRAPH = 8  # in decoding; deeper models take several calls of one graph
CACHES = 4  # of a layer: views of its keys and values to write to, and the two that are read
BLOCK_TENSORS = CACHES + 10  # of a block in `DecodeBlocks`: its caches and weights
# Bytes of weights that are read in the time in which a graph is compiled, some 2 s at 15 GB/s.
BYTES_A_COMPILATION = 30e9


def bucket(length, smallest, largest):
    """The power-of-two multiple of ``smallest`` that holds ``length``, at most ``largest``."""
    size = smallest
    while size < length:
        size *= 2
    return min(size, largest)


class PrefillAttention(nn.Cell):
    """A block's first half over a whole prompt; writes its keys and values into the cache."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    @ms.jit
    def construct(self, x, cos, sin, mask, shift, documents, index, key_cache, value_cache,
                  norm, query, key_value, dense, dense_bias):
        f, kernels = self.functions, self.functions.kernels
        query, key, value = f.heads(*f.project_qkv(x, norm, query, key_value), cos, sin)
        written = kernels.write_cache(key_cache, value_cache, key, value, index)
        attended = kernels.merge_heads(kernels.attention(query, key, value, mask, shift, documents, f.scale))
        return kernels.by_workers(ops.depend(f.project_attention(x, attended, dense, dense_bias), written))


class Logits(nn.Cell):
    """Logits of activations: x and what is to be added to it (N, H), None for nothing → (N, V)."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)  # the parameters keep the model's names
        self.model = model

    @ms.jit
    def construct(self, x, delta):
        return self.model.kernels.by_workers(self.model.head(x if delta is None else x + delta))


class DecodeBlocks(nn.Cell):
    """One new token a sequence through some consecutive blocks, anywhere in the model.

    Weights are arguments, so compile time does not grow with depth; calling takes 7 µs for each (measured on
    CPU). A cache is given twice, a view to be written to and the whole to be read: what a graph both writes and
    reads, or reshapes, MindSpore copies.
    """

    def __init__(self, model, max_length):
        super().__init__(auto_prefix=False)
        config = model.config
        self.kernels = model.kernels
        self.functions = model.transformer.h[0].functions
        self.cos, self.sin = map(model.kernels.rotary_tensor, decoding_tables(config, max_length))
        self.slopes = None
        if config.position_embedding == "alibi":
            self.slopes = device_tensor(alibi_slopes(config.n_head)[model.own_heads].reshape(1, -1, 1, 1))

    def where(self, positions, places, table, lengths, cache):
        """What `Kernels.cached_attention` needs to know of the tokens: their rotation and their places."""
        functions = self.functions
        rotation = None
        if functions.rotary:
            rotation = ops.gather(self.cos, positions, 0), ops.gather(self.sin, positions, 0)
        return rotation, self.kernels.decoding_places(positions, places, table, lengths, self.slopes,
                                                      functions.key_value_heads, cache.shape[2])

    @ms.jit
    def construct(self, x, delta, positions, places, table, batch_valid_length, *tensors):
        """x and what is to be added to it, (B, H) each → the same behind the blocks.

        positions, places, table, batch_valid_length: as `Kernels.decoding_places` takes them, under that name.
        tensors: for each block the caches of its keys and its values, the same two again, and its weights.
        """
        where = self.where(positions, places, table, batch_valid_length, tensors[CACHES - 1])
        for first in range(0, len(tensors), BLOCK_TENSORS):
            x, delta = self.functions.decode(x, delta, *where, tensors[first:first + CACHES],
                                             tensors[first + CACHES:first + BLOCK_TENSORS])
        return x, delta


class Decode(DecodeBlocks):
    """One new token a sequence through the whole model, in one graph: for shallow models on CPU."""

    def __init__(self, model, max_length):
        super().__init__(model, max_length)
        self.model = model

    @ms.jit
    def construct(self, x, positions, places, *caches):
        """x: tokens, int32 (B, 1), or their embeddings (B, H); positions int32 (B,) → logits (B, V).

        positions, places: as `Kernels.decoding_places` takes them of a cache without blocks; caches: four for each
        layer, as `BlockFunctions.decode` takes them.
        """
        where = self.where(positions, places, None, None, caches[CACHES - 1])
        x = self.model.embed(x) if x.dtype == ms.int32 else x
        delta = None  # what is still to be added to x: the next norm does it on the way
        for layer, block in enumerate(self.model.transformer.h):
            x, delta = block.functions.decode(x, delta, *where, caches[CACHES * layer:CACHES * (layer + 1)],
                                              block.weights())
        return self.model.head(x + delta)


class Engine:
    """The compiled graphs of one model and the cache they share.

    Args:
        model (TeleChat): the model.
        max_length (int): the longest sequence, prompt and answer together.
    """

    def __init__(self, model, max_length):
        self.model = model
        self.max_length = max_length
        self.slots = self.length = 0
        self._caches = []  # `CACHES` of each layer
        self._groups = []  # what each call of `DecodeBlocks` takes
        self._table = None
        self._weight_bytes = 4 * sum(map(math.prod, parameter_shapes(model.config).values()))
        self._compiled = set()  # what `decode` has been compiled for: (slots, length, batch size)
        self._wanted = collections.Counter()  # how often a smaller one would have done that is not among them
        config, functions = model.config, model.transformer.h[0].functions
        self._key_value_heads = functions.key_value_heads
        self._prefill_attention = PrefillAttention(functions)
        self._long_prefill_attention = LongPrefillAttention(functions)
        self._feed_forward = FeedForward(functions)
        self._logits = Logits(model)
        self._decode = Decode(model, max_length)
        self._decode_blocks = DecodeBlocks(model, max_length)
        self._decode_step = None  # the whole model in one operator, where the kernels have one
        if not functions.is_surrounded:
            slopes = alibi_slopes(config.n_head) if config.position_embedding == "alibi" else None
            tables = decoding_tables(config, max_length) if functions.rotary else None
            self._decode_step = model.kernels.decode_step(config, tables, slopes)

    def reserve(self, slots, length):
        """Make room for ``slots`` sequences of ``length`` tokens; what the cache held is lost."""
        length = bucket(length, SMALLEST_CACHE, self.max_length)
        if (slots, length) != (self.slots, self.length):
            config = self.model.config
            self.model.kernels.require_device()
            self._caches, self._groups = [], []  # freed before the new ones are made
            self._table = BlockTable(slots, length, block_size(config.head_dim)) if self.model.kernels.paged else None
            blocks = (slots, length) if self._table is None else (self._table.count, self._table.block_size)
            shape = self.model.kernels.cache_shape(*blocks, self._key_value_heads, config.head_dim)
            for _ in range(config.n_layer):
                caches = [device_zeros(shape, self.model.compute_dtype) for _ in range(2)]
                self._caches += [*map(self.model.kernels.cache_view, caches), *caches]
            if config.n_layer > LAYERS_A_GRAPH or self._table is not None:
                self._groups = [self._tensors(range(first, min(first + LAYERS_A_GRAPH, config.n_layer)))
                                for first in range(0, config.n_layer, LAYERS_A_GRAPH)]
            self.slots, self.length = slots, length

    def _tensors(self, layers):
        """Caches and weights of some layers, as `DecodeBlocks` takes them."""
        tensors = []
        for layer in layers:
            tensors += [*self._caches_of(layer), *self.model.transformer.h[layer].tensors()]
        return tensors

    def _caches_of(self, layer):
        return self._caches[CACHES * layer:CACHES * (layer + 1)]

    def takes_together(self, prompts):
        """Whether one call of `prefill` for all of ``prompts`` takes less time than one for each."""
        size = bucket(max(map(len, prompts)), SMALLEST_PREFILL, self.length)
        return 1 < len(prompts) and len(prompts) * size <= ROWS_TOGETHER

    def prefill(self, slots, prompts):
        """Run a prompt into each of some slots; float32 logits (N, V) of the tokens that follow them."""
        config, kernels = self.model.config, self.model.kernels
        counts = [len(prompt) for prompt in prompts]
        size = bucket(max(counts), SMALLEST_PREFILL, self.length)
        ids = np.zeros((len(prompts), size), np.int32)
        for row, prompt in zip(ids, prompts):
            row[:len(prompt)] = prompt
        # Rows past a prompt compute something that nothing reads: the mask is causal, and decoding
        # overwrites their cache entries before it looks at them.
        tables = [rotary_tables(config, np.arange(size), count) for count in counts]
        cos, sin = (kernels.rotary_tensor(np.stack(parts)[:, None]) for parts in zip(*tables))
        visible = kernels.attention_tensors(config, size, heads=self.model.own_heads)
        attention = self._long_prefill_attention if isinstance(visible[0], Pieces) else self._prefill_attention
        index = np.concatenate([self._prompt_index(slot, size) for slot in slots])
        tables = (cos, sin, *visible, Tensor(index))
        last = Tensor(np.arange(len(counts)) * size + counts - 1, ms.int32)
        x = self.model.embed(Tensor(ids))
        for layer, block in enumerate(track(self.model.transformer.h, "reading a prompt", "layers")):
            weights = block.tensors()
            x = attention(x, *tables, *self._caches_of(layer)[:2], *weights[:OF_ATTENTION])
            if layer == config.n_layer - 1 and x.shape[0] > SMALLEST_PREFILL:
                x = ops.gather(x, last, 0)  # the rows that are read; for a few more it is not worth a graph of its own
            x, _ = self._feed_forward(x, None, *weights[OF_ATTENTION:])
        if x.shape[0] > len(counts):
            x = ops.gather(x, last, 0)
        return self._logits(x, None).asnumpy()

    def _prompt_index(self, slot, size):
        """Where the first ``size`` tokens of a slot go in the cache."""
        if self._table is not None:
            self._table.clear(slot)
            self._table.grow(slot, size)
            return self._table.places(slot, np.arange(size))
        heads = np.arange(self._key_value_heads) + slot * self._key_value_heads
        return (heads[:, None] * self.length + np.arange(size)).reshape(-1).astype(np.int32)

    @property
    def batch_sizes(self):
        """Of `decode`: the powers of two, and the number of slots."""
        return [*(1 << power for power in range((self.slots - 1).bit_length())), self.slots]

    @property
    def uncompiled(self):
        """Those of `batch_sizes` that are to be compiled and have not been needed yet."""
        return [] if self._decode_step is not None else [size for size in self.batch_sizes if (self.slots, self.length, size) not in self._compiled]

    def decode(self, slots, tokens, positions):
        """Advance some slots: newest token's id and its position of each → float32 logits (N, V).

        Computed in a batch of the next of `batch_sizes`; one that has not been compiled yet is, unless a larger one
        has been and the size was not needed often enough to be worth it.
        """
        if self._decode_step is not None:
            transformer = self.model.transformer
            return self._decode_step(slots, tokens, positions, transformer.word_embeddings.weight,
                                     transformer.ln_f.weight, self.model.head_weight,
                                     [block.weights() for block in transformer.h],
                                     [self._caches_of(layer)[2:] for layer in range(self.model.config.n_layer)])
        slots = list(slots)
        size = self._choose_size(len(slots))
        if size > len(slots):
            # Idle slots fill up: what is written there is overwritten before it is read.
            slots += [slot for slot in range(self.slots) if slot not in set(slots)][:size - len(slots)]
        rows = np.argsort(slots)  # all slots are taken in their order
        filled = np.zeros((2, size), np.int32)
        filled[:, :len(tokens)] = tokens, positions
        new = size in self.uncompiled
        with Progress("compiling the next tokens' graph") if new else contextlib.nullcontext():
            logits = self._decode_rows(np.array(slots, np.int32)[rows], *filled[:, rows])
        self._compiled.add((self.slots, self.length, size))
        return logits[np.argsort(rows)[:len(tokens)]]

    def _choose_size(self, count):
        enough = [size for size in self.batch_sizes if size >= count]
        compiled = [size for size in enough if size not in self.uncompiled]
        if compiled and compiled[0] > enough[0]:
            # Counted, not timed: processes that share a model have to agree.
            wanted = self.slots, self.length, enough[0]
            self._wanted[wanted] += 1
            if self._wanted[wanted] * self._weight_bytes < BYTES_A_COMPILATION:
                return compiled[0]
        return enough[0]

    def _decode_rows(self, slots, tokens, positions):
        """`decode` of a batch as it is compiled: slots in ascending order."""
        x = Tensor(tokens[:, None])
        if self._groups or not self.model.embeds_in_graphs:
            x = self.model.embed(x)
        places = table = lengths = None
        if self._table is not None:
            for slot, position in zip(slots, positions):
                self._table.grow(slot, position + 1)
            places = Tensor(np.array([self._table.places(slot, at) for slot, at in zip(slots, positions)], np.int32))
            table, lengths = Tensor(self._table.table[slots]), Tensor(positions + 1)
        elif len(slots) < self.slots:
            places = Tensor(slots)
        positions = Tensor(positions)
        if not self._groups:
            return self._decode(x, positions, places, *self._caches).asnumpy()
        delta = ops.zeros_like(x)
        for tensors in self._groups:
            x, delta = self._decode_blocks(x, delta, positions, places, table, lengths, *tensors)
        return self._logits(x, delta).asnumpy()
