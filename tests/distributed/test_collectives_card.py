"""Every collective on two simulated cards, by MindSpore's own HCCL back end: what `test_collectives` asks of CPUs."""

import json

import pytest

from simulator import report
from simulator.environment import environment, unavailable
from tests.conftest import ROOT
from tests.distributed import test_collectives as cpu

KINDS = ("tensor", "data", "world", "pipeline")
GRADIENTS = [("world", "float32", 1), ("world", "bfloat16", 1)]
EXACT = [("world", "bfloat16")]

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.fixture(scope="module")
def results(msrun_in, tmp_path_factory):
    """What two ranks, the stages of a pipeline, stored."""
    folder = tmp_path_factory.mktemp("collectives_card")
    msrun_in(folder, 2, "collectives.py", json.dumps({"pipeline": 2}), folder, json.dumps(GRADIENTS), json.dumps(EXACT),
             timeout=300, environment=environment(base={"PYTHONPATH": str(ROOT)}, HCCL_EXEC_TIMEOUT="60",
                                                 SIM_LOG=str(folder / "log")))
    found = cpu.Results(folder, 2)
    found.launched = [[event for event in report.read(str(folder / f"log.{rank}")) if event.kind == "launch"] for rank in range(2)]
    return found


@pytest.fixture(scope="module")
def jobs(results):
    return lambda count: results


@pytest.mark.parametrize("mode", ["eager", "compiled", "again"])
@pytest.mark.parametrize("cell", cpu.MODEL)
@pytest.mark.parametrize("kind, dtype, times", GRADIENTS)
def test_forward_and_gradient(jobs, kind, dtype, times, cell, mode):
    cpu.test_forward_and_gradient(jobs, 2, kind, dtype, times, cell, mode)


@pytest.mark.parametrize("cell", ["GatherRows", "AllReduceMax"])
@pytest.mark.parametrize("kind, dtype", EXACT)
def test_extreme_values_are_exact(jobs, kind, dtype, cell):
    cpu.test_extreme_values_are_exact(jobs, 2, kind, dtype, cell)


@pytest.mark.parametrize("dtype", cpu.EPSILON)
@pytest.mark.parametrize("kind", KINDS)
def test_functions(jobs, kind, dtype):
    cpu.test_functions(jobs, 2, kind, dtype)


def test_messages_of_a_pipeline_cross(jobs):
    cpu.test_messages(jobs, 2, "pipeline")


def test_one_forward_one_backward(jobs):
    cpu.test_one_forward_one_backward(jobs, 2)


def test_barrier_objects_and_refusals(results):
    for facts in results.facts:
        assert facts["barrier"]
        assert facts["objects"] == [{"rank": rank, "text": "智" * rank} for rank in range(2)]
        native, ours = facts["refused"]
        assert "must be divided by 'rank_size'" in native  # ReduceScatter's own sentence
        assert "5 rows cannot be cut into 2 equal parts" in ours


@pytest.mark.parametrize("name", ["AllReduce", "AllGather", "ReduceScatter", "Broadcast", "Send", "Recv"])
def test_bfloat16_is_carried_as_it_is(results, name):
    """On a CPU it goes as float32. A pair of stages sends in both directions, so each rank sends and receives."""
    for launched in results.launched:
        assert any(event.name == f"Hccl{name}" and "bfloat16" in event.details for event in launched)
