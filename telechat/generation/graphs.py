"""The compiled graphs of generation: a block over a prompt or a part of one, and blocks over one new token a sequence."""

import mindspore as ms
from mindspore import nn, ops

from telechat.nn.alibi import alibi_slopes
from telechat.nn.block import with_adapters
from telechat.nn.block_graphs import FeedForward, joined
from telechat.nn.device import device_tensor
from telechat.nn.positions import decoding_tables

CACHES = 4  # of a layer: views of its keys and values to write to, and the two that are read
BLOCK_TENSORS = CACHES + 10  # of a block in `DecodeBlocks`: its caches and weights
FACTORS = 12  # of LoRA adapters, of a block
OF_ATTENTION = 6  # of them, the first ones


class PrefillAttention(nn.Cell):
    """A block's first half over a whole prompt; writes its keys and values into the cache."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    @ms.jit
    def construct(self, x, cos, sin, mask, position_bias, segment_ids, index, key_cache, value_cache,
                  norm, query, key_value, dense, dense_bias, columns=None, *factors):
        """columns, factors: as `with_adapters` takes them; None and nothing where no row has an adapter."""
        f, kernels = self.functions, self.functions.kernels
        query, key_value, dense = with_adapters((query, key_value, dense), columns, factors)
        query, key, value = f.heads(*f.project_qkv(x, norm, query, key_value), cos, sin)
        written = kernels.write_cache(key_cache, value_cache, key, value, index)
        attended = kernels.merge_heads(kernels.attention(query, key, value, mask, position_bias, segment_ids, f.scale))
        return ops.depend(f.project_attention(x, attended, dense, dense_bias), written)


class ExtendAttention(nn.Cell):
    """A block's first half over parts of prompts, whose tokens see what the cache holds of their sequences, too."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    @ms.jit
    def construct(self, x, cos, sin, mask, position_bias, index, table, key_cache, value_cache, keys, values,
                  norm, query, key_value, dense, dense_bias, columns=None, *factors):
        """mask, position_bias, table: as `Kernels.attention_over_cache` takes them; caches: to be written, and to be read;
        columns, factors: as of `PrefillAttention`."""
        f, kernels = self.functions, self.functions.kernels
        query, key_value, dense = with_adapters((query, key_value, dense), columns, factors)
        query, key, value = f.heads(*f.project_qkv(x, norm, query, key_value), cos, sin)
        written = kernels.write_cache(key_cache, value_cache, key, value, index)
        attended = kernels.attention_over_cache(query, keys, values, written, table, mask, position_bias, f.scale)
        return f.project_attention(x, kernels.merge_heads(attended), dense, dense_bias)


class AdaptedFeedForward(nn.Cell):
    """A block's second half where rows have adapters, as `FeedForward` without dropout."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions
        self.plain = FeedForward(functions)

    def construct(self, middle, columns, *tensors):
        """middle (rows, H), columns (rows, R), the half's weights and factors → the block's output."""
        parts = zip(self.plain.chunks(middle), self.plain.chunks(columns))
        return joined([self.forward_rows(*part, *tensors) for part in parts])

    @ms.jit
    def forward_rows(self, middle, columns, norm, gate, up, down, down_bias, *factors):
        """`construct` over some of the rows."""
        f = self.functions
        gate, up, down = with_adapters((gate, up, down), columns, factors)
        return f.project_down(middle, *f.project_gate_up(middle, norm, gate, up), down, down_bias)


class Logits(nn.Cell):
    """Logits of activations: x and what is to be added to it (N, H), None for nothing → (N, V)."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)  # the parameters keep the model's names
        self.model = model

    @ms.jit
    def construct(self, x, delta):
        return self.model.head(x if delta is None else x + delta)


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

    def where(self, positions, index, table, lengths, cache):
        """What `Kernels.cached_attention` needs to know of the tokens: their rotation and their places."""
        functions = self.functions
        rotation = None
        if functions.rotary:
            rotation = ops.gather(self.cos, positions, 0), ops.gather(self.sin, positions, 0)
        return rotation, self.kernels.decoding_places(positions, index, table, lengths, self.slopes, cache.shape[2])

    @ms.jit
    def construct(self, x, delta, positions, index, table, columns, *tensors):
        """x and what is to be added to it, (B, H) each → the same behind the blocks.

        positions, index, table: as `Kernels.decoding_places` takes them. columns: as `with_adapters` takes them; None where no row has an adapter.
        tensors: for each block the caches of its keys and its values, the same two again, its weights, and if there are
        columns the factors of adapters.
        """
        where = self.where(positions, index, table, None, tensors[CACHES - 1])
        size = BLOCK_TENSORS if columns is None else BLOCK_TENSORS + FACTORS
        for first in range(0, len(tensors), size):
            weights = adapted(tensors[first + CACHES:first + BLOCK_TENSORS], columns,
                              tensors[first + BLOCK_TENSORS:first + size])
            x, delta = self.functions.decode(x, delta, *where, tensors[first:first + CACHES], weights)
        return x, delta


def adapted(weights, columns, factors):
    """All of `Block.weights` with LoRA adapters, as `with_adapters` takes these; unchanged where columns is None."""
    if columns is None:
        return weights
    norm1, query, key_value, dense, dense_bias, norm2, gate, up, down, down_bias = weights
    query, key_value, dense, gate, up, down = with_adapters((query, key_value, dense, gate, up, down), columns, factors)
    return norm1, query, key_value, dense, dense_bias, norm2, gate, up, down, down_bias


class Decode(DecodeBlocks):
    """One new token a sequence through the whole model, in one graph: for shallow models on CPU."""

    def __init__(self, model, max_length):
        super().__init__(model, max_length)
        self.model = model

    @ms.jit
    def construct(self, x, positions, index, table, *caches):
        """x: tokens, int32 (B, 1), or their embeddings (B, H); positions int32 (B,) → logits (B, V).

        positions, index, table: as `Kernels.decoding_places` takes them; caches: four for each layer, as
        `BlockFunctions.decode` takes them.
        """
        where = self.where(positions, index, table, None, caches[CACHES - 1])
        x = self.model.embed(x) if x.dtype == ms.int32 else x
        delta = None  # what is still to be added to x: the next norm does it on the way
        for layer, block in enumerate(self.model.transformer.h):
            x, delta = block.functions.decode(x, delta, *where, caches[CACHES * layer:CACHES * (layer + 1)],
                                              block.weights())
        return self.model.head(x + delta)


class DecodeOnCard(nn.Cell):
    """One new token a sequence through the whole model, paged: one graph for one shape of its arguments.

    What a token takes of the host is, for a few layers, a microsecond for each launch and several for each call and each
    argument (benchmarks/more.md). So there is one call; weights are no arguments, but Parameters, which MindSpore looks up
    once; and the phase lets it run what was compiled first without looking at the arguments: hence one shape.

    Args:
        blocks (DecodeBlocks): computes.
        model (TeleChat or TensorParallelModel): whose they are.
    """

    def __init__(self, blocks, model):
        super().__init__(auto_prefix=False)
        self.blocks = blocks
        self.model = model
        self.weights = tuple(block.weights() for block in model.transformer.h)
        self.phase = "increment"  # what MindSpore calls a step that brings one more token

    @ms.jit
    def construct(self, x, positions, index, table, batch_valid_length, columns, *tensors):
        """x: tokens, int32 (B,), or their embeddings (B, H) → float32 logits (B, V).

        positions, index, table, columns: as of `DecodeBlocks`; batch_valid_length: the lengths of `Kernels.decoding_places`,
        under that name; tensors: for each block the caches of its keys and its values and, if there are columns, the
        factors of adapters.
        """
        size = 2 if columns is None else 2 + FACTORS
        where = self.blocks.where(positions, index, table, batch_valid_length, tensors[1])
        x = self.model.embed(x) if x.dtype == ms.int32 else x
        delta = None
        for layer, weights in enumerate(self.weights):
            caches = tensors[size * layer:size * layer + 2]
            factors = tensors[size * layer + 2:size * layer + size]
            x, delta = self.blocks.functions.decode(x, delta, *where, caches + caches, adapted(weights, columns, factors))
        return self.model.head(x + delta)
