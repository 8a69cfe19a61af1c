"""What the estimate says is sent in a step, against counts taken while four processes take one."""

import json

import pytest

pytestmark = pytest.mark.wide

MODEL = dict(vocab_size=101, hidden_size=32, n_layer=3, n_head=4, ffn_hidden_size=48,
             tie_word_embeddings=False)
TIED = {**MODEL, "tie_word_embeddings": True, "num_key_value_heads": 2}
NO_BIAS = {**MODEL, "use_bias": False}

# Name → model, batch size, micro-batches, dtype, ParallelConfig.
CASES = {
    "tp2 pp2, tied": (TIED, 4, 4, "float32", dict(tensor=2, pipeline=2)),
    "tp2 pp2, sequence parallel, recompute, no bias": (
        NO_BIAS, 4, 2, "float32", dict(tensor=2, pipeline=2, sequence_parallel=True, recompute=True)),
    "dp2 tp2, recompute": (TIED, 4, 2, "float32", dict(data=2, tensor=2, recompute=True)),
    "dp2 tp2, sequence parallel": (MODEL, 4, 2, "float32", dict(data=2, tensor=2, sequence_parallel=True)),
    "dp2 pp2, tied, sharded optimizer": (
        TIED, 4, 2, "float32", dict(data=2, pipeline=2, shard_optimizer=True)),
}


@pytest.fixture(scope="module")
def reports(msrun_in, tmp_path_factory):
    """For each case the four ranks' counts and estimates."""
    folder = tmp_path_factory.mktemp("traffic")
    names = ("model", "batch_size", "micro_batches", "dtype", "parallel")
    (folder / "cases.json").write_text(json.dumps([dict(zip(names, case)) for case in CASES.values()]))
    msrun_in(folder, 4, "traffic.py", folder / "cases.json", folder, timeout=400)
    return {name: [json.loads((folder / f"{place}-{rank}.json").read_text()) for rank in range(4)]
            for place, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_bytes_and_calls_of_every_collective(reports, name):
    for rank, report in enumerate(reports[name]):
        assert report["counted"], "something was counted"
        assert report["estimated"] == report["counted"], (name, rank)
