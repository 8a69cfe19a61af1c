"""The binding of PagedAttention and ReshapeAndCache refuses what their kernels do not take, by argument."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from telechat.errors import InputError
from telechat.nn.paged_attention import block_size, obstacle, paged_attention, write_cache
from tests.test_model import small_config


def tensor(dtype, *shape):
    return Tensor(np.zeros(shape, np.float32)).astype(dtype)


CACHE, HALF, INT = (6, 64, 2, 160), ms.bfloat16, ms.int32
ATTENTION = dict(query=(HALF, 3, 640), key_cache=(HALF, *CACHE), value_cache=(HALF, *CACHE), table=(INT, 3, 2), lengths=(INT, 3))
WRITE = dict(key_cache=(HALF, *CACHE), value_cache=(HALF, *CACHE), key=(HALF, 5, 320), value=(HALF, 5, 320), places=(INT, 5))


@pytest.mark.parametrize("argument, changes, words", [
    ("key_cache", dict(key_cache=(HALF, 6, 128, 2, 160), value_cache=(HALF, 6, 128, 2, 160)), "at most 102 tokens for heads of 160"),
    ("key_cache", dict(key_cache=(HALF, 6, 16, 2, 320), value_cache=(HALF, 6, 16, 2, 320)), "up to 256, not 320"),
    ("key_cache", dict(key_cache=(HALF, 6, 16, 2, 24), value_cache=(HALF, 6, 16, 2, 24)), "multiple of 16 up to 256, not 24"),
    ("key_cache", dict(key_cache=(HALF, 6, 48, 2, 160), value_cache=(HALF, 6, 48, 2, 160)), "blocks of 16, 32, 64, 128 tokens, not 48"),
    ("query", dict(query=(HALF, 3, 258 * 160)), "at most 128 heads for each of the cache's, not 129"),
    ("key_cache", dict(key_cache=(ms.float32, *CACHE)), "must be float16 or bfloat16, not Float32"),
    ("value_cache", dict(value_cache=(HALF, 6, 64, 1, 160)), "must have key_cache's shape"),
    ("query", dict(query=(ms.float16, 3, 640)), "must be BFloat16 as the cache is"),
    ("query", dict(query=(HALF, 3, 480)), "n a multiple of 2"),
    ("table", dict(table=(ms.int64, 3, 2)), "must be int32 .3, blocks., not Int64"),
    ("lengths", dict(lengths=(INT, 2)), "must be int32 .3,., not Int32 .2,."),
])
def test_wrong_attention_is_named(argument, changes, words):
    with pytest.raises(InputError, match=f"^paged attention: {argument} .*{words}"):
        paged_attention(*(tensor(*what) for what in {**ATTENTION, **changes}.values()), 1.0)


@pytest.mark.parametrize("argument, changes, words", [
    ("key", dict(key=(HALF, 5, 640)), "must be .tokens, 320."), ("value", dict(value=(HALF, 4, 320)), "must have key's shape"),
    ("key", dict(key=(ms.float16, 5, 320)), "must be BFloat16 as the cache is"),
    ("places", dict(places=(INT, 4)), "must be int32 .5,."),
])
def test_wrong_writes_are_named(argument, changes, words):
    with pytest.raises(InputError, match=f"^paged attention: {argument} .*{words}"):
        write_cache(*(tensor(*what) for what in {**WRITE, **changes}.values()))


@pytest.mark.parametrize("head_dim, tokens", [(16, 128), (64, 128), (128, 128), (160, 64), (256, 64)])
def test_a_block_is_as_large_as_the_kernel_takes(head_dim, tokens):
    assert block_size(head_dim) == tokens and tokens * head_dim <= 16384


def test_what_a_model_cannot_have():
    assert obstacle(small_config(hidden_size=64), ms.bfloat16) is None
    assert "not float32" in obstacle(small_config(hidden_size=64), ms.float32)
    assert "not 24" in obstacle(small_config(hidden_size=96), ms.float16)
    many = small_config(hidden_size=129 * 16, n_head=129, num_key_value_heads=1)
    assert "up to 128 heads for a key-value head, not 129" in obstacle(many, ms.bfloat16)
