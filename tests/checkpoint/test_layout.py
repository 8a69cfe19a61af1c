"""Names and shapes against the published index files; the mapping against what the layouts mean."""

import json
import math

import numpy as np
import pytest

from telechat.checkpoint import layout
from telechat.config import TeleChatConfig


def config_of(**values):
    sizes = dict(vocab_size=24, hidden_size=24, n_layer=2, n_head=6, ffn_hidden_size=20)
    return TeleChatConfig(**{**sizes, **values})


def official(config, name):
    """The StoredTensor called `name` of the published layout."""
    return next(tensor for tensor in layout.official_parameters(config) if tensor.name == name)


@pytest.mark.parametrize("model", ["7b", "12b", "52b"])
def test_published_sizes_equal_their_index(shared, model):
    config = TeleChatConfig.from_pretrained(shared / "data" / f"telechat_{model}.config.json")
    index = json.loads((shared / "data" / f"telechat_{model}.pytorch_model.bin.index.json").read_text())
    tensors = layout.official_parameters(config)
    weights = {name for name in index["weight_map"] if not name.endswith("attn.masked_bias")}
    assert {tensor.name for tensor in tensors} == weights and len(tensors) == len(weights)
    assert {tensor.name for tensor in layout.official_tensors(config)} == set(index["weight_map"])
    # The published weights take two bytes a value, constants included.
    values = sum(math.prod(tensor.shape) for tensor in layout.official_tensors(config))
    assert 2 * values == index["metadata"]["total_size"]
    shapes = layout.parameter_shapes(config)
    assert sum(map(math.prod, shapes.values())) == sum(math.prod(tensor.shape) for tensor in tensors)
    held = [parameter for tensor in tensors for parameter in tensor.parameters]
    assert sorted(held) == sorted(shapes)


def test_canonical_names_are_those_of_the_published_12b(shared):
    index = json.loads((shared / "data" / "telechat_12b.pytorch_model.bin.index.json").read_text())
    config = TeleChatConfig.from_pretrained(shared / "data" / "telechat_12b.config.json")
    assert set(layout.parameter_shapes(config)) == set(index["weight_map"])


def test_shapes_and_order():
    shapes = layout.parameter_shapes(config_of(n_layer=1, num_key_value_heads=2))
    assert list(shapes.items()) == [
        ("transformer.word_embeddings.weight", (24, 24)),
        ("transformer.h.0.input_layernorm.weight", (24,)),
        ("transformer.h.0.self_attention.query.weight", (24, 24)),
        ("transformer.h.0.self_attention.key_value.weight", (16, 24)),
        ("transformer.h.0.self_attention.dense.weight", (24, 24)),
        ("transformer.h.0.self_attention.dense.bias", (24,)),
        ("transformer.h.0.post_attention_layernorm.weight", (24,)),
        ("transformer.h.0.mlp.gate_proj.weight", (20, 24)),
        ("transformer.h.0.mlp.up_proj.weight", (20, 24)),
        ("transformer.h.0.mlp.down_proj.weight", (24, 20)),
        ("transformer.h.0.mlp.down_proj.bias", (24,)),
        ("transformer.ln_f.weight", (24,)),
        ("lm_head.weight", (24, 24)),
    ]


def test_bias_and_head_follow_the_config():
    full = set(layout.parameter_shapes(config_of()))
    assert full - set(layout.parameter_shapes(config_of(tie_word_embeddings=True))) == {"lm_head.weight"}
    biases = {name for name in full if name.endswith(".bias")}
    assert len(biases) == 4 and full - set(layout.parameter_shapes(config_of(use_bias=False))) == biases


@pytest.mark.parametrize("key_value_heads", [6, 2])
def test_52b_attention_computes_the_same(key_value_heads):
    """x · c_attn, cut as GPT-2 code cuts it, against the canonical query and key_value."""
    config = config_of(style="gpt2", use_bias=False, num_key_value_heads=key_value_heads)
    tensor = official(config, "transformer.h.1.attn.c_attn.weight")
    size, key = config.head_dim, key_value_heads * config.head_dim
    generator = np.random.default_rng(0)
    weight = generator.integers(-9, 9, tensor.shape).astype(np.float64)  # integers: exact in any order
    x = generator.integers(-9, 9, (5, config.hidden_size)).astype(np.float64)
    query, keys, values = np.split(x @ weight, [24, 24 + key], axis=1)
    ours_query, ours_key_value = tensor.split(weight)
    assert np.array_equal(x @ ours_query.T, query)
    heads = (x @ ours_key_value.T).reshape(5, key_value_heads, 2 * size)
    for head in range(key_value_heads):
        assert np.array_equal(heads[:, head, :size], keys[:, head * size:(head + 1) * size])
        assert np.array_equal(heads[:, head, size:], values[:, head * size:(head + 1) * size])


def test_52b_mlp_computes_the_same():
    config = config_of(style="gpt2", use_bias=False)
    tensor = official(config, "transformer.h.0.mlp.c_fc.weight")
    generator = np.random.default_rng(0)
    weight = generator.integers(-9, 9, tensor.shape).astype(np.float64)
    x = generator.integers(-9, 9, (5, config.hidden_size)).astype(np.float64)
    gate, up = tensor.split(weight)
    assert np.array_equal(x @ gate.T, (x @ weight)[:, :20])
    assert np.array_equal(x @ up.T, (x @ weight)[:, 20:])


@pytest.mark.parametrize("values", [
    dict(), dict(tie_word_embeddings=True), dict(style="gpt2", use_bias=False),
    dict(style="gpt2", use_bias=True),
    dict(style="gpt2", use_bias=False, num_key_value_heads=3)])
def test_join_inverts_split_bit_for_bit(values):
    config = config_of(**values)
    shapes = layout.parameter_shapes(config)
    generator = np.random.default_rng(0)
    for tensor in layout.official_parameters(config):
        # All bit patterns, NaN included: nothing may be computed with the values.
        array = generator.integers(0, 2**16, tensor.shape).astype(np.uint16).view(np.float16)
        parts = tensor.split(array)
        assert [part.shape for part in parts] == [shapes[name] for name in tensor.parameters]
        assert tensor.join(*parts).tobytes() == array.tobytes()


def test_buffers_are_told_from_weights():
    assert layout.is_buffer("transformer.h.3.attn.masked_bias")
    assert layout.is_buffer("transformer.h.3.attn.bias")
    assert not layout.is_buffer("transformer.h.0.self_attention.dense.bias")
    assert not layout.is_buffer("transformer.h.0.attn.c_proj.bias")
