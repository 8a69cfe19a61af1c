"""The mesh: coordinates, groups, refusals; as arithmetic, and as MindSpore's groups under msrun."""

import json

import pytest

from telechat.config import TeleChatConfig
from telechat.errors import InputError
from telechat.parallel.mesh import Mesh, group_name, groups_of, mesh_shape
from telechat.parallel.rendezvous import other_nodes_without_time_out
from telechat.parallel.parallel_config import ParallelConfig
from telechat.parallel.plan import check_batch, check_mesh


def test_groups_of_eight():
    """2 × 2 × 2: rank = (pp·2 + dp)·2 + tp, written out."""
    assert groups_of(8, pipeline=2, data=2, tensor=2) == {
        "tensor": [(0, 1), (2, 3), (4, 5), (6, 7)],
        "data": [(0, 2), (1, 3), (4, 6), (5, 7)],
        "pipeline": [(0, 4), (1, 5), (2, 6), (3, 7)],
        "world": [(0, 1, 2, 3, 4, 5, 6, 7)],
        "embedding": [(0, 4), (1, 5), (2, 6), (3, 7)],
    }


def test_groups_of_three_stages():
    """The middle stage holds no embedding; without pipeline there is nobody to share it with."""
    groups = groups_of(6, pipeline=3, data=1, tensor=2)
    assert groups["pipeline"] == [(0, 2, 4), (1, 3, 5)]
    assert groups["embedding"] == [(0, 4), (1, 5), (2,), (3,)]
    assert groups_of(2, pipeline=1, data=1, tensor=2)["embedding"] == [(0,), (1,)]


def test_places_in_eight():
    mesh = Mesh.place(5, pipeline=2, data=2, tensor=2)
    assert mesh.describe() == "rank 5/8: pipeline 1/2, data 0/2, tensor 1/2"
    assert mesh.coordinates == (1, 0, 1)
    assert (mesh.tensor.ranks, mesh.tensor.rank) == ((4, 5), 1)
    assert (mesh.data.ranks, mesh.data.rank) == ((5, 7), 0)
    assert (mesh.pipeline.ranks, mesh.pipeline.rank) == ((1, 5), 1)
    assert (mesh.embedding.ranks, mesh.embedding.rank) == ((1, 5), 1)
    assert (mesh.world.rank, mesh.world.size) == (5, 8)


@pytest.mark.parametrize("pipeline, data, tensor", [(2, 3, 4), (4, 1, 2), (1, 5, 1), (3, 2, 1)])
def test_every_rank_has_one_place(pipeline, data, tensor):
    size = pipeline * data * tensor
    for groups in groups_of(size, pipeline, data, tensor).values():
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(size))
    seen, ranks_of = set(), {}
    for rank in range(size):
        mesh = Mesh.place(rank, pipeline, data, tensor)
        pp, dp, tp = mesh.coordinates
        assert (mesh.pipeline.rank, mesh.data.rank, mesh.tensor.rank) == (pp, dp, tp)
        assert (mesh.pipeline.size, mesh.data.size, mesh.tensor.size) == (pipeline, data, tensor)
        seen.add(mesh.coordinates)
        for group in (mesh.tensor, mesh.data, mesh.pipeline, mesh.world, mesh.embedding):
            assert group.ranks[group.rank] == rank and group.size == len(group.ranks)
            assert (group.name is None) == (group.size == 1)
            # A name means the same ranks to everyone.
            assert ranks_of.setdefault(group.name, group.ranks) == group.ranks or group.size == 1
    assert len(seen) == size


def test_group_names_fit_hccl():
    assert len(group_name(tuple(range(0, 100000, 16)))) + len("_return") < 128


def test_single():
    mesh = Mesh.single()
    assert mesh.describe() == "rank 0/1: pipeline 0/1, data 0/1, tensor 0/1"
    assert {group.name for group in (mesh.tensor, mesh.data, mesh.pipeline, mesh.world, mesh.embedding)} == {None}
    assert Mesh.create(ParallelConfig()) == mesh


def test_data_is_filled_in():
    assert mesh_shape(ParallelConfig(tensor=2, pipeline=2), 8) == (2, 2, 2)
    assert mesh_shape(ParallelConfig(), 3) == (1, 3, 1)


@pytest.mark.parametrize("fields, size, sentence", [
    (dict(tensor=3, pipeline=2), 8,
     "parallel: tensor 3 × pipeline 2 needs a multiple of 6 processes, and there are 8; "
     "start 6 or 12 processes, or with 8 set tensor 4, pipeline 2, data 1"),
    (dict(tensor=2, pipeline=2, data=3), 8,
     "parallel: tensor 2 × pipeline 2 × data 3 needs 12 processes, and there are 8; "
     "start 12 processes, or with 8 set tensor 2, pipeline 2, data 2"),
    (dict(tensor=8), 1,
     "parallel: tensor 8 × pipeline 1 needs a multiple of 8 processes, and there are 1; "
     "start 8 processes, or with 1 set tensor 1, pipeline 1, data 1"),
])
def test_what_does_not_fit_is_refused(fields, size, sentence):
    with pytest.raises(InputError) as refusal:
        mesh_shape(ParallelConfig(**fields), size)
    assert str(refusal.value) == sentence


SHAPES = dict(vocab_size=96, hidden_size=96, n_layer=6, n_head=12, num_key_value_heads=12, ffn_hidden_size=36)


@pytest.mark.parametrize("model, fields, processes, sentence", [
    (dict(num_key_value_heads=6), dict(tensor=4), None,
     "parallel.tensor 4 does not divide num_key_value_heads 6; the nearest that fits is 3"),
    (dict(num_key_value_heads=6), dict(tensor=4), 4,
     "parallel.tensor 4 does not divide num_key_value_heads 6; the nearest that fits is 2"),
    (dict(ffn_hidden_size=34), dict(tensor=6), 6,
     "parallel.tensor 6 does not divide ffn_hidden_size 34; the nearest that fits is 2"),
    (dict(), dict(tensor=8), 8, "parallel.tensor 8 does not divide n_head 12; the nearest that fits is 4"),
    (dict(), dict(tensor=8, data=1), 8, "parallel.tensor 8 does not divide n_head 12; the nearest that fits is 6"),
    (dict(vocab_size=5), dict(tensor=6), None,
     "parallel.tensor 6 is more than vocab_size 5; the nearest that fits is 4"),
    (dict(), dict(pipeline=8), 8, "parallel.pipeline 8 is more than n_layer 6; the nearest that fits is 4"),
    (dict(), dict(pipeline=7), None, "parallel.pipeline 7 is more than n_layer 6; the nearest that fits is 6"),
    (dict(), dict(pipeline=2, stages=[2, 3]), 2,
     "parallel.stages [2, 3] holds 5 layers, the model has n_layer 6; make them agree"),
])
def test_what_the_model_does_not_fit_is_refused(model, fields, processes, sentence):
    config = TeleChatConfig(**{**SHAPES, **model})
    with pytest.raises(InputError) as refusal:
        check_mesh(config, ParallelConfig(**fields), processes)
    assert str(refusal.value) == sentence


def test_what_the_model_fits_is_not_refused():
    """A vocabulary need not divide."""
    for tensor, pipeline in ((1, 1), (4, 6), (12, 1)):
        check_mesh(TeleChatConfig(**{**SHAPES, "vocab_size": 97}), ParallelConfig(tensor=tensor, pipeline=pipeline))


@pytest.mark.parametrize("batch, micro, data, fields, sentence", [
    (6, 2, 2, dict(), "batch_size 6 must be a multiple of 4: micro_batches 2 on each of 2 data-parallel ranks"),
    (4, 2, 2, dict(tensor=4, sequence_parallel=True),
     "parallel.sequence_parallel needs the 10 tokens of a micro-batch to divide by parallel.tensor 4; "
     "change batch_size or turn it off"),
])
def test_a_batch_that_does_not_divide_is_refused(batch, micro, data, fields, sentence):
    with pytest.raises(InputError) as refusal:
        check_batch(batch, micro, data, 10, ParallelConfig(**fields))
    assert str(refusal.value) == sentence
    check_batch(batch // (micro * data) * micro * data, micro, data, 12, ParallelConfig(**fields))


def test_four_processes(msrun, tmp_path):
    """Three meshes in one job: each group connects the ranks that it says it does."""
    shapes = [dict(tensor=2), dict(pipeline=2, tensor=2), dict(pipeline=4)]
    msrun(4, "mesh.py", tmp_path, json.dumps(shapes))
    for rank in range(4):
        seen = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        for result, fields in zip(seen, shapes, strict=True):
            expected = Mesh.place(rank, *mesh_shape(ParallelConfig(**fields), 4))
            assert result["describe"] == expected.describe()
            assert tuple(result["coordinates"]) == expected.coordinates
            for kind, (name, ranks, place) in result["groups"].items():
                group = getattr(expected, kind)
                assert (name, tuple(ranks), place) == (group.name, group.ranks, group.rank)
                assert tuple(result["members"][kind]) == group.ranks


def test_what_does_not_fit_is_refused_by_one_process(msrun, tmp_path):
    """The others end without a word, and nobody goes on."""
    job = msrun(2, "mesh.py", tmp_path, json.dumps([dict(tensor=3)]), check=False, timeout=60)
    assert job.exit_code != 0
    sentence = "InputError: parallel: tensor 3 × pipeline 1 needs a multiple of 3 processes, and there are 2"
    assert [log.count(sentence) for log in job.logs] == [1, 0]
    assert "Traceback" not in job.logs[1]
    assert not list(tmp_path.glob("rank_*.json"))


@pytest.mark.parametrize("command, expected", [
    ("msrun --worker_num 16 --local_worker_num 8 --node_rank 0 --join=True train.py", True),
    ("msrun --worker_num=16 --local_worker_num=8 train.py", True),
    ("msrun --worker_num 16 train.py", True),  # msrun starts 8
    ("msrun --worker_num 16 --local_worker_num 8 --cluster_time_out=900 train.py", False),
    ("msrun --worker_num 2 --local_worker_num 2 train.py --worker", False),
    ("bash run.sh", False),
    ("", False),
])
def test_other_nodes_are_not_waited_for_longer_than_said(command, expected):
    assert other_nodes_without_time_out(command.split(" ")) == expected
