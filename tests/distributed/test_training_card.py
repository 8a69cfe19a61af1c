"""The official trace on simulated cards: tensor, sequence, data and pipeline, and a resume on another mesh."""

import json

import numpy as np
import pytest

from simulator import report
from simulator.environment import environment, unavailable
from tests.conftest import ROOT
from tests.distributed.test_training import PATIENT, RECIPE

pytestmark = [pytest.mark.ascend, pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))]

# Model and cards: name → ParallelConfig, settings of the training, where it stops, name of the run that it goes on with.
RUNS = {
    ("telechat_12b", 2): {
        "tensor": (dict(tensor=2, sequence_parallel=True), {}, 8, None),
        "data": (dict(data=2, shard_optimizer=True), {}, 4, None),
        "pipeline": (dict(pipeline=2), dict(micro_batches=2), 8, "data"),
        "bfloat16": (dict(tensor=2), dict(dtype="bfloat16"), 8, None),
        "bfloat16, sequence": (dict(tensor=2, sequence_parallel=True), dict(dtype="bfloat16"), 3, None)},
    ("telechat_12b", 4): {
        "data and tensor": (dict(data=2, tensor=2, shard_optimizer=True), {}, 4, None),
        "pipeline and tensor": (dict(pipeline=2, tensor=2), dict(micro_batches=2), 8, "data and tensor")},
    # The embedding's gradient comes in bfloat16 from the first stage and in float32 from the last.
    ("telechat_7b", 2): {"tied, in two stages": (dict(pipeline=2), dict(dtype="bfloat16"), 8, None)},
}
# What a layer sends, forward and backward: a sum behind each pair of products and one before each; or rows gathered where
# they enter the products and scattered where they leave, and the norms' rows gathered again for the gradients of weights.
SENT = {"bfloat16": ({"HcclAllReduce": 2}, {"HcclAllReduce": 2}),
        "bfloat16, sequence": ({"HcclAllGather": 2, "HcclReduceScatter": 2}, {"HcclAllGather": 4, "HcclReduceScatter": 2})}


def check_sent(log, runs):
    """The collectives of each layer of the runs in `SENT`, which are the last ones, in all their steps but the first two."""
    _, steps = report.cut(report.read(log))
    for name, (_, _, last, _) in reversed(runs.items()):
        own, steps = steps[len(steps) - last:], steps[:len(steps) - last]
        if name not in SENT:
            return
        for step in own[2:]:
            for anchor, without, expected in (("FlashAttentionScore", "Grad", SENT[name][0]),
                                              ("FlashAttentionScoreGrad", "CrossEntropy", SENT[name][1])):
                found = report.layer(step, anchor, without)
                assert {kind: count for kind, count in found.items() if kind.startswith("Hccl")} == expected, (name, anchor)


@pytest.mark.parametrize("reference, cards", RUNS, indirect=["reference"])
def test_the_official_trace(request, reference, msrun, tmp_path, cards):
    golden, runs = reference.golden, RUNS[request.node.callspec.params["reference"], cards]
    np.savez(tmp_path / "batches.npz", ids=golden["train_input_ids"], labels=golden["train_labels"])
    cases = [{"checkpoint": str(reference.directory), "batches": str(tmp_path / "batches.npz"), "parallel": parallel,
              "output": str(tmp_path / (resumed or name)), "train": {**RECIPE, **train}, "stop_after": last,
              "resume": resumed is not None} for name, (parallel, train, last, resumed) in runs.items()]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    msrun(cards, "trace.py", tmp_path / "cases.json", timeout=600, environment=environment(
        base={"PYTHONPATH": str(ROOT)}, SIM_LOG=str(tmp_path / "log"), **PATIENT))
    wanted = np.stack([golden["train_loss"], golden["train_grad_norm"]], 1)
    for case, (name, (_, train, last, resumed)) in zip(cases, runs.items()):
        reports = [json.loads((tmp_path / (resumed or name) / f"trace-{last}-rank-{rank}.json").read_text())
                   for rank in range(cards)]
        assert all(report["steps"] == reports[0]["steps"] for report in reports), name
        found = np.array(reports[0]["steps"])[:, :2]
        part = wanted[runs[resumed][2] if resumed else 0:last]
        if "dtype" in train:
            assert np.abs(found[:, 0] / part[:, 0] - 1).max() < 0.02, name
        else:
            assert np.abs(found / part - 1).max() < 1e-4, name
    for rank in range(cards):
        check_sent(str(tmp_path / f"log.{rank}"), runs)
