"""Prefill and decode with a key-value cache: the compiled part of generation.

Every sequence has a slot. A prompt is prefilled on its own, so a slot may be refilled while others
go on; decoding advances all slots by a token in one graph. Positions count from 0 in each slot, and
what a slot computes does not depend on its neighbours.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from telechat.nn import kernels
from telechat.nn.alibi import alibi_slopes
from telechat.nn.positions import causal_mask, decoding_tables
from telechat.nn.rotary import rotary_tables

SMALLEST_PREFILL = 32
SMALLEST_CACHE = 128


def bucket(length, smallest, largest):
    """The power-of-two multiple of ``smallest`` that holds ``length``, at most ``largest``."""
    size = smallest
    while size < length:
        size *= 2
    return min(size, largest)


def own_heads(model):
    """The heads that a model computes, a slice: all of them, or a tensor-parallel rank's share."""
    return getattr(model, "own_heads", slice(None))


class PrefillBlock(nn.Cell):
    """One block over a whole prompt; writes its keys and values into the cache."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions
        self.write = ops.ScatterUpdate()

    @ms.jit
    def construct(self, x, cos, sin, mask, index, key_cache, value_cache, *weights):
        f = self.functions
        query, key_value = f.project_qkv(x, weights[0], weights[1], weights[2])
        query, key, value = f.heads(query, key_value, cos, sin)
        writes = (self.write(key_cache, index, key.reshape(-1, f.head_dim)),
                  self.write(value_cache, index, value.reshape(-1, f.head_dim)))
        attended = f.merge(kernels.attention(query, key, value, mask, f.scale))
        return ops.depend(f.finish(x, attended, weights), writes)


class LastLogits(nn.Cell):
    """Logits at one position of a prompt."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)  # the parameters keep the model's names
        self.model = model

    @ms.jit
    def construct(self, x, row):
        return self.model.head(ops.gather(x, row, 0))


class Decode(nn.Cell):
    """All blocks for one new token in every slot, from its embedding to its logits."""

    def __init__(self, model, max_length):
        super().__init__(auto_prefix=False)  # the parameters keep the model's names
        config = model.config
        self.model = model
        self.write = ops.ScatterUpdate()
        self.key_value_heads = model.transformer.h[0].functions.key_value_heads
        cos, sin = decoding_tables(config, max_length)
        self.cos, self.sin = Tensor(cos), Tensor(sin)
        self.slopes = None
        if config.position_embedding == "alibi":
            self.slopes = Tensor(alibi_slopes(config.n_head)[own_heads(model)].reshape(1, -1, 1, 1))

    @ms.jit
    def construct(self, x, positions, *caches):
        """x (B, H), positions int32 (B,), caches: keys then values of each layer, (B·m·T, D) → (B, V)."""
        batch, heads = x.shape[0], self.key_value_heads
        length = caches[0].shape[0] // (batch * heads)
        cos = ops.gather(self.cos, positions, 0).reshape(batch, 1, 1, -1)
        sin = ops.gather(self.sin, positions, 0).reshape(batch, 1, 1, -1)
        distance = positions.reshape(batch, 1, 1, 1) - ops.arange(length).astype(ms.int32)
        bias = 0.0 if self.slopes is None else -self.slopes * distance.astype(ms.float32)
        mask = ops.select(distance >= 0, bias + ops.zeros_like(distance).astype(ms.float32), kernels.MASKED)
        index = (ops.arange(batch * heads).astype(ms.int32).reshape(batch, heads) * length
                 + positions.reshape(batch, 1)).reshape(-1)
        for layer, block in enumerate(self.model.transformer.h):
            f, weights = block.functions, block.weights()
            key_cache, value_cache = caches[2 * layer], caches[2 * layer + 1]
            query, key_value = f.project_qkv(x, weights[0], weights[1], weights[2])
            query, key, value = f.heads(query, key_value, cos, sin)
            keys = ops.depend(key_cache, self.write(key_cache, index, key.reshape(-1, f.head_dim)))
            values = ops.depend(value_cache, self.write(value_cache, index, value.reshape(-1, f.head_dim)))
            shape = (batch, heads, length, f.head_dim)
            attended = f.merge(kernels.attention(query, keys.reshape(shape), values.reshape(shape), mask, f.scale))
            x = f.finish(x, attended, weights)
        return self.model.head(x)


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
        self._caches = []
        self._key_value_heads = model.transformer.h[0].functions.key_value_heads
        self._prefill_block = PrefillBlock(model.transformer.h[0].functions)
        self._last_logits = LastLogits(model)
        self._decode = Decode(model, max_length)

    def reserve(self, slots, length):
        """Make room for ``slots`` sequences of ``length`` tokens; what the cache held is lost."""
        length = bucket(length, SMALLEST_CACHE, self.max_length)
        if (slots, length) != (self.slots, self.length):
            config = self.model.config
            self._caches = []  # freed before the new ones are made
            shape = (slots * self._key_value_heads * length, config.head_dim)
            self._caches = [ops.zeros(shape, self.model.compute_dtype) for _ in range(2 * config.n_layer)]
            self.slots, self.length = slots, length

    def prefill(self, slot, prompt):
        """Run a prompt into ``slot``; float32 logits (V,) of the token that follows it."""
        config = self.model.config
        count = len(prompt)
        size = bucket(count, SMALLEST_PREFILL, self.length)
        ids = np.zeros((1, size), np.int32)
        ids[0, :count] = prompt
        # Rows past the prompt compute something that nothing reads: the mask is causal, and decoding
        # overwrites their cache entries before it looks at them.
        cos, sin = rotary_tables(config, np.arange(size), count)
        heads = np.arange(self._key_value_heads) + slot * self._key_value_heads
        index = (heads[:, None] * self.length + np.arange(size)).reshape(-1).astype(np.int32)
        mask = causal_mask(config, size)
        if mask.shape[1] > 1:
            mask = np.ascontiguousarray(mask[:, own_heads(self.model)])
        tables = (Tensor(cos[None, None]), Tensor(sin[None, None]), Tensor(mask), Tensor(index))
        x = self.model.embed(Tensor(ids))
        for layer, block in enumerate(self.model.transformer.h):
            weights = [None if weight is None else weight.data for weight in block.weights()]
            x = self._prefill_block(x, *tables, *self._caches[2 * layer:2 * layer + 2], *weights)
        return self._last_logits(x, Tensor([count - 1], ms.int32)).asnumpy()[0]

    def decode(self, tokens, positions):
        """Advance every slot: its newest token's id and position → float32 logits (slots, V)."""
        x = self.model.embed(Tensor(np.asarray(tokens, np.int32)[:, None]))
        return self._decode(x, Tensor(np.asarray(positions, np.int32)), *self._caches).asnumpy()
