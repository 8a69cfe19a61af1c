"""Prompts and new tokens through a model by compiled graphs: where the kernels have no operator for the whole model."""

import collections
import contextlib
import math

import numpy as np
from mindspore import Tensor, ops

from telechat.checkpoint.layout import parameter_shapes
from telechat.generation import graphs
from telechat.generation.graphs import (AdaptedFeedForward, Decode, DecodeBlocks, DecodeOnCard, ExtendAttention, Logits,
                                         PrefillAttention)
from telechat.nn.block import OF_ATTENTION
from telechat.nn.block_graphs import FeedForward
from telechat.nn.blockwise_attention import BlockMasks
from telechat.nn.blockwise_block import PrefillAttentionByBlocks
from telechat.nn.device import Sender, device_tensor
from telechat.progress import Progress, track

SMALLEST_PREFILL = 32
SMALLEST_CACHE = 128
ROWS_TOGETHER = 1024  # of prompts that are prefilled in one call: with more, products take most of the time
LAYERS_A_GRAPH = 8  # in decoding; deeper models take several calls of one graph
# Bytes of weights that are read in the time in which a graph is compiled, some 2 s at 15 GB/s.
BYTES_A_COMPILATION = 30e9


def bucket(length, smallest, largest):
    """The power-of-two multiple of ``smallest`` that holds ``length``, at most ``largest``."""
    size = smallest
    while size < length:
        size *= 2
    return min(size, largest)


class GraphSteps:
    """The graphs of one model, compiled at first use for each of their shapes.

    Args:
        model (TeleChat or TensorParallelModel): the model.
        max_length (int): the longest sequence.
        tokens (int): that `decode` is to take of a sequence at a time, at most.
        adapters (AdapterSet): LoRA adapters that rows may have; None: none.
    """

    def __init__(self, model, max_length, tokens=1, adapters=None):
        self.model = model
        self._tokens = tokens
        self.max_length = max_length
        functions = model.transformer.h[0].functions
        self._key_value_heads = functions.key_value_heads
        self._prefill_attention = PrefillAttention(functions)
        self._prefill_attention_by_blocks = PrefillAttentionByBlocks(functions)
        self._extend_attention = ExtendAttention(functions)
        self._feed_forward = FeedForward(functions)
        self._adapters = adapters
        self._adapted_feed_forward = AdaptedFeedForward(functions)
        self._logits = Logits(model)
        self._decode = Decode(model, max_length)
        self._decode_blocks = DecodeBlocks(model, max_length)
        self._on_card = {}  # shapes of arguments → `DecodeOnCard`
        self._send = Sender()
        self._weight_bytes = 4 * sum(map(math.prod, parameter_shapes(model.config).values()))
        self._compiled = set()  # what `decode` has been compiled for: (slots, blocks of one, batch size)
        self._wanted = collections.Counter()  # how often a smaller one would have done that is not among them
        self.cache = None
        self._groups = []  # what each call of `DecodeBlocks` takes
        self._adapted_groups = []  # likewise where rows have adapters

    def use(self, cache):
        """Work on a `KeyValueCache` from now on; None: on none, so that it may be freed."""
        self.cache, self._groups, self._adapted_groups = cache, [], []
        layers = self.model.config.n_layer
        groups = [range(first, min(first + LAYERS_A_GRAPH, layers)) for first in range(0, layers, LAYERS_A_GRAPH)]
        if cache is None or self.model.kernels.paged:
            return
        if layers > LAYERS_A_GRAPH:
            self._groups = [self._tensors(group) for group in groups]
        if self._adapters is not None:
            self._adapted_groups = [self._tensors(group, self._adapters.layers) for group in groups]

    def _tensors(self, layers, factors=None):
        """Caches, weights and if need be factors of some layers, as `DecodeBlocks` takes them."""
        return [tensor for layer in layers
                for tensor in (*self.cache.layers[layer], *self.model.transformer.h[layer].tensors(),
                               *(() if factors is None else factors[layer]))]

    @property
    def _shape(self):
        return self.cache.table.table.shape

    @property
    def _most_rows(self):
        """Rows that a call of `prefill` may have, filled up ones too: ReshapeAndCache takes no more than the cache holds."""
        if not self.model.kernels.paged:
            return math.inf
        return (self.cache.table.pool.count + 1) * self.cache.table.block_size

    def takes_together(self, counts):
        """Whether one call of `prefill` for parts of so many tokens can be, and takes less time than one for each."""
        rows = len(counts) * bucket(max(counts), SMALLEST_PREFILL, self.max_length)
        return rows <= min(ROWS_TOGETHER, self._most_rows)

    def prefill(self, slots, chunks, starts, rotations, columns=None):
        """Parts of prompts, of which the cache holds what is before: float32 logits (N, V) of what follows each.

        Args:
            slots (list of int): of the cache's table, which has blocks for all tokens.
            chunks (list of lists of int): token ids.
            starts (list of int): the position of each part's first token.
            rotations (list): cos and sin of each part's tokens, float32 arrays (tokens, D); None for each with ALiBi.
            columns (array): of `AdapterSet.columns`, for each part; None: no part has an adapter.
        """
        model, config, kernels = self.model, self.model.config, self.model.kernels
        counts = [len(chunk) for chunk in chunks]
        if columns is not None and max(counts) > ROWS_TOGETHER:
            return np.concatenate([self._prefill_long(*part) for part in zip(slots, chunks, starts, rotations, columns)])
        size = bucket(max(counts), SMALLEST_PREFILL, max(self.max_length, max(counts)))
        size = max(min(size, self._most_rows // len(counts)), max(counts))
        ids = np.zeros((len(chunks), size), np.int32)
        # Rows past a part compute something that nothing reads: it goes to the block that is never read, and as their
        # position is 0 they see the first token alone.
        positions, places = np.zeros_like(ids), np.zeros_like(ids)
        cos, sin = (np.zeros((len(chunks), 1, size, config.head_dim), np.float32) for _ in range(2))
        for row, (slot, chunk, start, rotation) in enumerate(zip(slots, chunks, starts, rotations)):
            count = len(chunk)
            ids[row, :count], positions[row, :count] = chunk, np.arange(start, start + count)
            places[row, :count] = self.cache.table.places(slot, positions[row, :count])
            if rotation is not None:
                cos[row, 0, :count], sin[row, 0, :count] = rotation
        tables = (kernels.rotary_tensor(cos), kernels.rotary_tensor(sin))
        attention, tables, held = self._attention(slots, starts, size, positions, places, tables)
        last = Tensor((np.arange(len(counts)) * size + counts - 1).astype(np.int32))
        x = model.embed(Tensor(ids))
        if columns is not None:
            columns = device_tensor(np.repeat(columns, size, 0), model.compute_dtype)
        for layer, block in enumerate(track(model.transformer.h, "reading a prompt", "layers")):
            weights = block.tensors()
            factors = () if columns is None else (columns, *self._adapters.layers[layer][:graphs.OF_ATTENTION])
            x = attention(x, *tables, *self.cache.layers[layer][:held], *weights[:OF_ATTENTION], *factors)
            if layer == config.n_layer - 1 and x.shape[0] > SMALLEST_PREFILL:
                x = ops.gather(x, last, 0)  # the rows that are read; for a few more it is not worth a graph of its own
                columns = None if columns is None else ops.gather(columns, last, 0)
            if columns is None:
                x, _ = self._feed_forward(x, None, *weights[OF_ATTENTION:])
            else:
                x = self._adapted_feed_forward(x, columns, *weights[OF_ATTENTION:],
                                               *self._adapters.layers[layer][graphs.OF_ATTENTION:])
        if x.shape[0] > len(counts):
            x = ops.gather(x, last, 0)
        return self._logits(x, None).asnumpy()

    def _prefill_long(self, slot, chunk, start, rotation, columns):
        """`prefill` of one part with an adapter that is long: bit by bit, so that no graph of its own is needed."""
        for first in range(0, len(chunk), ROWS_TOGETHER):
            part = slice(first, first + ROWS_TOGETHER)
            turned = None if rotation is None else tuple(table[part] for table in rotation)
            logits = self.prefill([slot], [chunk[part]], [start + first], [turned], columns[None])
        return logits

    def _attention(self, slots, starts, size, positions, places, tables):
        """The first half of a block for some parts, its arguments before the caches, and how many of these it takes."""
        config, kernels, table = self.model.config, self.model.kernels, self.cache.table
        index = kernels.cache_index(places, self._key_value_heads, table.block_size)
        if not any(starts):  # all that they see is here
            visible = kernels.attention_tensors(config, size, heads=self.model.own_heads)
            by_blocks = isinstance(visible[0], BlockMasks)
            attention = self._prefill_attention_by_blocks if by_blocks else self._prefill_attention
            return attention, (*tables, *visible, index), 2
        length = bucket(int(positions.max()) + 1, SMALLEST_CACHE, table.table.shape[1] * table.block_size)
        blocks = -(-length // table.block_size)
        visible = kernels.chunk_tensors(config, positions, blocks * table.block_size, self.model.own_heads)
        held = Tensor(np.ascontiguousarray(table.table[list(slots), :blocks]))
        return self._extend_attention, (*tables, *visible, index, held), 4

    @property
    def batch_sizes(self):
        """Of `decode`: the powers of two up to that which holds all rows, and the number of slots."""
        slots = self._shape[0]
        rows = slots * self._tokens
        powers = (rows - 1).bit_length() + (rows > slots)
        return sorted({*(1 << power for power in range(powers)), slots})

    @property
    def uncompiled(self):
        """Those of `batch_sizes` that are to be compiled and have not been needed yet."""
        return self._uncompiled(False) if self._adapters is None else sorted({*self._uncompiled(False), *self._uncompiled(True)})

    def _uncompiled(self, adapted):
        """`uncompiled` of the graphs with adapters, or of those without."""
        return [size for size in self.batch_sizes if (*self._shape, size, adapted) not in self._compiled]

    def decode(self, slots, tokens, positions, columns=None):
        """One more token of each of some sequences: its id and position → float32 logits (N, V).

        Computed in a batch of the next of `batch_sizes`; one that has not been compiled yet is, unless a larger one
        has been and the size was not needed often enough to be worth it. columns: of `AdapterSet.columns`, for each token;
        None: none has an adapter.
        """
        count, adapted = len(slots), columns is not None
        size = self._choose_size(count, adapted)
        # Rows that fill up the batch write to the block that is never read.
        filled = np.zeros((2, size), np.int32)
        filled[:, :count] = tokens, positions
        places, table = np.zeros((size, 1), np.int32), np.zeros((size, self._shape[1]), np.int32)
        places[:count, 0] = self.cache.table.places(np.asarray(slots), positions)
        table[:count] = self.cache.table.table[list(slots)]
        if adapted:
            columns = device_tensor(np.concatenate([columns, np.zeros((size - count, columns.shape[1]), np.float32)]),
                                    self.model.compute_dtype)
        with Progress("compiling the next tokens' graph") if size in self._uncompiled(adapted) else contextlib.nullcontext():
            logits = self._decode_rows(*filled, places, table, columns)
        self._compiled.add((*self._shape, size, adapted))
        return logits[:count]

    def _choose_size(self, count, adapted):
        if count > self.batch_sizes[-1]:  # more tokens of a sequence than were announced
            return 1 << (count - 1).bit_length()
        enough = [size for size in self.batch_sizes if size >= count]
        compiled = [size for size in enough if size not in self._uncompiled(adapted)]
        if compiled and compiled[0] > enough[0]:
            # Counted, not timed: processes that share a model have to agree.
            wanted = *self._shape, enough[0], adapted
            self._wanted[wanted] += 1
            if self._wanted[wanted] * self._weight_bytes < BYTES_A_COMPILATION:
                return compiled[0]
        return enough[0]

    def _decode_rows(self, tokens, positions, places, table, columns):
        """`decode` of a batch as it is compiled."""
        kernels = self.model.kernels
        if kernels.paged:
            return self._decode_on_card(tokens, positions, places.reshape(-1), table, columns)
        groups = self._groups if columns is None else self._adapted_groups
        index = kernels.cache_index(places, self._key_value_heads, self.cache.table.block_size)
        x, positions, table, index = map(self._send, (tokens[:, None], positions, table, index))
        if groups or not self.model.embeds_in_graphs:
            x = self.model.embed(x)
        if not groups:
            caches = [tensor for layer in self.cache.layers for tensor in layer]
            logits = self._decode(x, positions, index, table, *caches)
        else:
            delta = ops.zeros_like(x)
            for tensors in groups:
                x, delta = self._decode_blocks(x, delta, positions, index, table, columns, *tensors)
            logits = self._logits(x, delta)
        return self._read(logits)

    def _decode_on_card(self, tokens, positions, places, table, columns):
        """`_decode_rows` by one graph, which is given all on the card: a host tensor would make it wait at each."""
        x, *where = map(self._send, (tokens, positions, places, table, positions + 1))
        if not self.model.embeds_in_graphs:
            x = self.model.embed(x)
        layers = self.cache.layers
        tensors = [tensor for layer, (_, _, *caches) in enumerate(layers)
                   for tensor in (*caches, *(() if columns is None else self._adapters.layers[layer]))]
        shape = table.shape, layers[0][-1].shape, columns is None
        if shape not in self._on_card:
            self._on_card[shape] = DecodeOnCard(self._decode_blocks, self.model)
        return self._read(self._on_card[shape](x, *where, columns, *tensors))

    def _read(self, logits):
        """A graph's result as an array; what was sent for it has arrived."""
        logits = logits.asnumpy()
        self._send.clear()
        return logits
