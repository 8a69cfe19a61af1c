"""Decoding on a cache in blocks, with the Ascend operations replaced by what their documentation says they do."""

import mindspore as ms
from mindspore import ops

from telechat import Generator, SamplingParams, TeleChat
from telechat.generation import cache, graph_steps
from telechat.nn import ascend_kernels, portable_kernels
from telechat.nn.ascend import AscendKernels
from telechat.nn.kernels import Kernels
from tests.test_model import small_config

_write = ops.ScatterNdUpdate()


def write_cache(key_cache, value_cache, key, value, slots):
    """ReshapeAndCache: token i of (N, m·D) goes to place slots[i] of the blocks, counted through."""
    blocks, size, heads, dim = key_cache.shape
    index = ops.stack((slots // size, slots % size), -1)
    return (_write(key_cache, index, key.reshape(-1, heads, dim)),
            _write(value_cache, index, value.reshape(-1, heads, dim)))


def paged_attention(query, key_cache, value_cache, table, lengths, scale):
    """PagedAttention: over the first lengths[b] tokens of the blocks table[b]."""
    batch, (_, size, heads, dim) = table.shape[0], key_cache.shape
    length = table.shape[1] * size

    def gathered(cache):
        # In one operation all is read when the query is there; here the parts must wait for it.
        return ops.gather(ops.depend(cache, query), table, 0).reshape(batch, length, heads, dim).transpose(0, 2, 1, 3)

    hidden = ops.arange(length).reshape(1, -1) >= lengths.reshape(-1, 1)
    mask = hidden.astype(ms.float32).reshape(batch, 1, 1, length) * portable_kernels.MASKED
    query = query.reshape(batch, -1, 1, dim)
    return portable_kernels.attention(query, gathered(key_cache), gathered(value_cache), mask, scale).reshape(batch, -1)


def rotate_token(query, key, cos, sin, lengths):
    """ApplyRotaryPosEmb: rotate-half of each head, by the table's row of each token."""
    batch, dim = cos.shape
    cos, sin = cos.reshape(batch, 1, 1, dim), sin.reshape(batch, 1, 1, dim)
    return [portable_kernels.rotate(x.reshape(batch, -1, 1, dim), cos, sin).reshape(batch, -1) for x in (query, key)]


class Paged(AscendKernels):
    """But for the cache what every device has."""

    linear, rms_norm, add_rms_norm, swiglu = Kernels.linear, Kernels.rms_norm, Kernels.add_rms_norm, Kernels.swiglu
    require_device = Kernels.require_device


def test_answers_are_those_of_the_plain_cache(monkeypatch):
    """Sequences of different lengths, more of them than slots, over blocks of 4 tokens; two layers a graph."""
    for function in (write_cache, paged_attention, rotate_token):
        monkeypatch.setattr(ascend_kernels, function.__name__, function)
    model = TeleChat(small_config(initializer_range=0.3, num_key_value_heads=2, n_layer=3))
    prompts = [[5, 9, 3], [7, 1, 2, 8, 60, 11, 4], [8] * 6]
    params = SamplingParams(14)
    expected = Generator(model, max_length=40, batch_size=2).generate(prompts, params)

    monkeypatch.setattr(cache, "block_size", lambda head_dim: 4)
    monkeypatch.setattr(graph_steps, "LAYERS_A_GRAPH", 2)
    model.set_kernels(Paged(ms.float32, flash=False, paged=True))
    generator = Generator(model, max_length=40, batch_size=2)
    assert generator.generate(prompts, params) == expected
    assert tuple(generator._engine._cache.layers[0][2].shape) == (21, 4, 2, 8), "and a block that is not read"
