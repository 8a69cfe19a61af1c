"""A block cut over two ranks, as Ascend compiles it: which collectives, how many, over which group."""

import json

import pytest


@pytest.fixture(scope="module")
def graphs(msrun_in, tmp_path_factory):
    """What ascend_blocks.py stored: a dictionary for each rank."""
    folder = tmp_path_factory.mktemp("ascend_blocks")
    msrun_in(folder, 2, "ascend_blocks.py", folder, timeout=300, environment={"MS_NODE_TIMEOUT": "60"})
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


def test_tensor_parallel(graphs):
    """One sum behind each pair of products; in the backward pass one before each, and nothing twice."""
    for graph in graphs:
        total = ["AllReduce", {"group": graph["group"], "op": "sum"}]
        assert graph["tensor"]["forward"] == [total, total]
        assert graph["tensor"]["backward"] == [total, total]


def test_sequence_parallel(graphs):
    """Gathers where rows enter the products, scatters where they leave; gathered again in the backward pass."""
    for graph in graphs:
        gather = ["AllGather", {"group": graph["group"], "rank_size": 2}]
        scatter = ["ReduceScatter", {"group": graph["group"], "op": "sum", "rank_size": 2}]
        assert graph["sequence"]["forward"] == [gather, scatter, gather, scatter]
        backward = graph["sequence"]["backward"]
        # The gradient gathered twice and scattered twice, and the norms' rows gathered again for the products.
        assert sorted(name for name, _ in backward) == ["AllGather"] * 4 + ["ReduceScatter"] * 2
        assert all(found in (gather, scatter) for found in backward)


def test_each_rank_has_half_of_the_heads(graphs):
    for graph in graphs:
        for kind in ("tensor", "sequence"):
            assert graph[kind]["heads"] == [2, 2]
            assert graph[kind]["recomputed"] == [1, 2, 1]
