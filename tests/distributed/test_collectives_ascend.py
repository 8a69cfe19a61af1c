"""The Ascend side of every collective: the primitives in its graphs, exported under a 2-rank msrun."""

import json

import pytest

NAME = "ranks_from_0_by_1_count_2"
SUM = ["AllReduce", {"group": NAME, "op": "sum"}]
MAX = ["AllReduce", {"group": NAME, "op": "max"}]
GATHER = ["AllGather", {"group": NAME, "rank_size": 2}]
SCATTER = ["ReduceScatter", {"group": NAME, "rank_size": 2, "op": "sum"}]
SLICE = ["StridedSlice", {}]

# All that the graphs of bfloat16 tensors hold, forward and backward: no cast and nothing else beside it.
CELLS = {
    "CopyTo": ([], [SUM]),
    "ReduceFrom": ([SUM], []),
    "GatherRows": ([GATHER], [SCATTER]),
    "ScatterRows": ([SCATTER], [GATHER]),
    "SplitRows": ([SLICE], [GATHER]),
    "UnsplitRows": ([GATHER], [SLICE]),
    "AllReduceSum": ([SUM], []),
    "AllReduceMax": ([MAX], []),
}


@pytest.fixture(scope="module")
def graphs(msrun_in, tmp_path_factory):
    """What ascend_graphs.py stored: a dictionary for each rank."""
    folder = tmp_path_factory.mktemp("ascend_graphs")
    msrun_in(folder, 2, "ascend_graphs.py", folder)
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("cell", CELLS)
def test_compiled(graphs, cell):
    for rank, graph in enumerate(graphs):
        for direction, expected in zip(("forward", "backward"), CELLS[cell]):
            found = graph[cell][direction]
            assert [operation[:2] for operation in found] == expected
            for name, _, constants in found:
                if name == "StridedSlice":
                    # From row, to row, step: half of four rows forward, of eight backward.
                    rows = {"SplitRows": 2, "UnsplitRows": 4}[cell]
                    assert constants[:3] == [[rank * rows], [rank * rows + rows], [1]]


def only(operations):
    """The one operation that communicates."""
    found = [operation for operation in operations if operation[0].startswith("DistComm")]
    assert len(found) == 1
    name, _, constants = found[0]
    return name, constants


def test_functions(graphs):
    for rank, graph in enumerate(graphs):
        assert only(graph["all_reduce"]) == ("DistCommAllReduce", ["sum", NAME])
        assert only(graph["all_gather_rows"]) == ("DistCommAllGatherIntoTensor", [2, NAME])
        assert only(graph["reduce_scatter_rows"]) == ("DistCommReduceScatterTensor", [2, "sum", NAME])
        # The second number is this rank's own place.
        assert only(graph["broadcast"]) == ("DistCommBroadcast", [1, rank, NAME])
        assert not any(operation[0] == "Cast" for name in ("all_reduce", "broadcast") for operation in graph[name])


def test_messages_to_lower_ranks_have_a_group_of_their_own(graphs):
    """Else two pipeline stages that send to each other would queue both sends before both receives."""
    first, second = graphs
    returning = f"{NAME}_return"
    assert first["group"] == second["group"] == [NAME, returning]
    # Peer, group, tag; a receive has the tag first.
    assert only(first["send"]) == ("DistCommIsend", [1, NAME, 0])
    assert only(second["receive"]) == ("DistCommIrecv", [0, 0, NAME])
    assert only(second["send"]) == ("DistCommIsend", [0, returning, 0])
    assert only(first["receive"]) == ("DistCommIrecv", [0, 1, returning])
