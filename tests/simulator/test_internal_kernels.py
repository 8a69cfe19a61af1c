"""MindSpore's internal kernels on the simulated card, called as a graph calls them, against their formulas in float64.

What they compute: MindSpore's documentation of PagedAttention, ReshapeAndCache, ApplyRotaryPosEmb (cos_format 2: both
halves of a row equal), AddRmsNorm and FlashAttentionScore; the layouts, its own code that calls the library.
"""

import subprocess
import sys

import numpy as np
import pytest

from simulator.environment import environment, unavailable

if unavailable():
    pytest.skip(unavailable(), allow_module_level=True)

import torch  # noqa: E402

from tests.conftest import ROOT  # noqa: E402

HEADS, KV_HEADS, BATCH, BLOCK = 4, 2, 2, 16
LENGTHS, TABLE, SLOTS = (18, 7), ((3, 1), (5, 0)), (17, 86)
DTYPES = {"float16": 2**-11, "bfloat16": 2**-8}


def inputs():
    """{"kernel.dtype_argument": array}; arrays in float32 whose values each dtype has."""
    rng, result = np.random.default_rng(7), {}

    def normal(dtype, *shape):
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(getattr(torch, dtype)).float().numpy()

    def add(case, *arguments):
        result.update({f"{case}_{place}": argument for place, argument in enumerate(arguments)})

    def paged(case, dtype, dim, block, rank=3, slots=SLOTS):
        query = normal(dtype, BATCH, 1, HEADS * dim)
        add(case, query if rank == 3 else query[:, 0], normal(dtype, BATCH, KV_HEADS * dim),
            normal(dtype, BATCH, KV_HEADS * dim), normal(dtype, 8, block, KV_HEADS, dim),
            normal(dtype, 8, block, KV_HEADS, dim), np.array(slots, np.int32), np.array(TABLE, np.int32),
            np.array(LENGTHS, np.int32))

    for dtype in DTYPES:
        add(f"matmul.{dtype}", normal(dtype, 5, 48), normal(dtype, 32, 48))
        add(f"gather.{dtype}", normal(dtype, 10, 32), np.array([[3, 9], [0, 3]], np.int32))
        small = 2.0**-8  # so that epsilon counts
        add(f"norm.{dtype}", normal(dtype, 3, 64) * small, normal(dtype, 3, 64) * small, normal(dtype, 64))
        add(f"rotary.{dtype}", normal(dtype, 3, HEADS * 32), normal(dtype, 3, KV_HEADS * 32), normal(dtype, 3, 32),
            normal(dtype, 3, 32), np.ones(3, np.int32))
        add(f"flash.{dtype}", *(normal(dtype, BATCH, 24, HEADS * 16) for _ in range(3)))
        paged(f"paged.{dtype}", dtype, 32, BLOCK)
    paged("paged.float16.block", "float16", 160, 128)  # 12B's heads in blocks of 128
    paged("paged.float16.flat", "float16", 32, BLOCK, rank=2)
    add("gather.float16.outside", normal("float16", 10, 32), np.array([[3, 10]], np.int32))  # the last: it stops the card
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(inputs, results) of one process."""
    folder = tmp_path_factory.mktemp("internal")
    given = inputs()
    np.savez(folder / "inputs.npz", **given)
    subprocess.run([sys.executable, "-m", "tests.simulator.run_internal", folder / "inputs.npz", folder / "results.npz"],
                   check=True, env=environment(PYTHONPATH=str(ROOT)), timeout=300, cwd=folder)
    return given, dict(np.load(folder / "results.npz"))


def case(run, name):
    given, results = run
    take = lambda values: [values[key] for key in values if key.rpartition("_")[0] == name]  # noqa: E731
    assert f"{name}_error" not in results, results.get(f"{name}_error")
    return [x.astype(np.float64) if x.dtype == np.float32 else x for x in take(given)], take(results)


def assert_close(result, expected, dtype, roundings=1.0):
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() <= 1.01 * roundings * DTYPES[dtype] * max(1, np.abs(expected).max())


def attend(query, keys, values):
    scores = keys @ query * len(query)**-0.5
    weights = np.exp(scores - scores.max())
    return weights / weights.sum() @ values


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_and_gather(run, dtype):
    (x, weight), (result,) = case(run, f"matmul.{dtype}")
    assert_close(result, x @ weight.T, dtype)
    (table, indices), (result,) = case(run, f"gather.{dtype}")
    assert np.array_equal(result, table[indices])


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(run, dtype):
    (x, delta, weight), (normed, reciprocals, total) = case(run, f"norm.{dtype}")
    assert np.allclose(total, x + delta, rtol=DTYPES[dtype], atol=2.0**-25)
    assert np.isnan(reciprocals).all()  # whether the kernel gives them is not documented: nobody may use them
    total = total.astype(np.float64)
    assert_close(normed, total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5) * weight, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(run, dtype):
    (query, key, cos, sin, _), results = case(run, f"rotary.{dtype}")
    for x, result in zip((query, key), results):
        heads = x.reshape(3, -1, 32)
        turned = np.concatenate((-heads[..., 16:], heads[..., :16]), -1)
        expected = heads * cos[:, None] + turned * sin[:, None]
        assert_close(result, expected.reshape(x.shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_flash_attention(run, dtype):
    (query, key, value), (result,) = case(run, f"flash.{dtype}")
    heads = [x.reshape(BATCH, 24, HEADS, 16) for x in (query, key, value)]
    expected = [[[attend(heads[0][b, i, h], heads[1][b, :, h], heads[2][b, :, h]) for h in range(HEADS)]
                 for i in range(24)] for b in range(BATCH)]
    assert_close(result, np.array(expected).reshape(result.shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_is_written_in_place_and_attended(run, dtype):
    (query, key, value, *caches, slots, table, lengths), (result, *after) = case(run, f"paged.{dtype}")
    expected = [cache.reshape(-1, KV_HEADS, 32).copy() for cache in caches]
    for cache, rows, stored in zip(expected, (key, value), after):
        cache[slots] = rows.reshape(BATCH, KV_HEADS, 32)
        assert np.array_equal(stored.reshape(cache.shape), cache)
    for b, length in enumerate(lengths):
        places = [table[b, i // BLOCK] * BLOCK + i % BLOCK for i in range(length)]
        for h, row in enumerate(query[b, 0].reshape(HEADS, 32)):
            keys, values = (cache[places, h // (HEADS // KV_HEADS)] for cache in expected)
            assert_close(result[b, 0].reshape(HEADS, 32)[h], attend(row, keys, values), dtype)


@pytest.mark.parametrize(("name", "words"), {
    "paged.float16.block": ("head_dim * table_block_size > 16384", "160 * 128", "key_cache float16 (8,128,2,160)"),
    "paged.float16.flat": ("query must be (batch, 1, heads * head_dim)", "MS_INTERNAL_DISABLE_CUSTOM_KERNEL_LIST"),
    "gather.float16.outside": ("index 10 is outside the table's 10 rows", "InternalGather"),
}.items())
def test_refusals_reach_the_caller(run, name, words):
    error = str(run[1][f"{name}_error"])
    for word in words:
        assert word in error
