"""Count the communication of one training step where it happens, and write it beside the estimate.

traffic.py CASES.json OUTPUT: a list of {"model", "batch_size", "micro_batches", "dtype", "parallel"}; for
each case and rank "OUTPUT/case-rank.json" holds calls and bytes by group and operation, as counted and as
estimated.

Compiled graphs are counted as they run: a Python function stands before every collective in them, and is
left out by the compiler where the collective is.
"""

import collections
import dataclasses
import json
import os
import sys

import numpy as np
from mindspore import nn, ops

from telechat.parallel import collectives

counts = collections.Counter()  # (group, operation) → calls and bytes
groups = {}  # id of a Group → its kind in the mesh
outermost = [True]


def count(group, operation, size):
    kind = groups[id(group)]
    counts[kind, operation, "calls"] += 1
    counts[kind, operation, "bytes"] += size


class Counted(nn.Cell):
    """A collective of a compiled graph that counts its runs; ``copies``: size of the whole in arguments."""

    def __init__(self, group, name, operation, copies=1):
        super().__init__()

        def counting(x):
            count(group, name, x.nbytes * copies)
            return x

        self.count = ops.Custom(counting, lambda shape: shape, lambda dtype: dtype, func_type="pyfunc")
        self.operation = operation

    def construct(self, x):
        return self.operation(self.count(x))


def counted_operations(group, native, make=collectives._operations):
    operations = make(group, native)
    if group.size == 1:
        return operations
    return operations._replace(
        sum=Counted(group, "all-reduce", operations.sum), max=Counted(group, "all-reduce", operations.max),
        gather=Counted(group, "all-gather", operations.gather, group.size),
        scatter=Counted(group, "reduce-scatter", operations.scatter))


def counted(name, function, group_place, copies=lambda group: 1):
    """A function outside graphs; on CPU some are made of others, which do not count again."""
    def call(*arguments):
        group = arguments[group_place]
        own = outermost[0] and group.size > 1
        if own:
            count(group, name, arguments[0].nbytes * copies(group))
            outermost[0] = False
        try:
            return function(*arguments)
        finally:
            outermost[0] = outermost[0] or own
    return call


# Before the modules that import them by name.
collectives._operations = counted_operations
collectives.all_reduce = counted("all-reduce", collectives.all_reduce, 1)
collectives.all_gather_rows = counted("all-gather", collectives.all_gather_rows, 1, lambda group: group.size)
collectives.reduce_scatter_rows = counted("reduce-scatter", collectives.reduce_scatter_rows, 1)
collectives.send = counted("send", collectives.send, 2)

from telechat.config import TeleChatConfig  # noqa: E402
from telechat.parallel.estimate_speed import traffic  # noqa: E402
from telechat.parallel.mesh import KINDS, Mesh  # noqa: E402
from telechat.parallel.stage import build_stage, read_random  # noqa: E402
from telechat.training import step  # noqa: E402
from telechat.training.memory import workload_of  # noqa: E402
from telechat.training.run_config import RunConfig  # noqa: E402
from telechat.training.trainer import Trainer  # noqa: E402

LENGTH = 24
step.HEAD_LOGITS, step.HEAD_ROWS = 1, 16  # several chunks of logits, the last of them filled up


def run(case):
    model = TeleChatConfig.from_dict(case["model"])
    config = RunConfig.from_dict({"batch_size": case["batch_size"], "micro_batches": case["micro_batches"],
                                  "dtype": case["dtype"], "parallel": case["parallel"]})
    mesh = Mesh.create(config.parallel)
    parallel = dataclasses.replace(config.parallel, data=mesh.data.size)
    groups.update({id(getattr(mesh, kind)): kind for kind in KINDS})
    trainer = Trainer(build_stage(model, case["dtype"], mesh, parallel, read_random(model, 0)), config.train,
                      parallel, mesh)
    shape = (config.batch_size, LENGTH + 1)
    ids = np.random.default_rng(0).integers(4, model.vocab_size, shape).astype(np.int32)
    counts.clear()
    trainer.train_step(ids, ids)
    workload = workload_of(model, config, LENGTH, on_cpu=True)
    expected = collections.Counter()
    for item in traffic(model, parallel, workload, mesh.pipeline.rank):
        expected[item.group, item.operation, "calls"] += item.calls
        expected[item.group, item.operation, "bytes"] += item.tensor_bytes
    return mesh.rank, {"counted": named(counts), "estimated": named(expected)}


def named(counter):
    return {" ".join(key): number for key, number in counter.items()}


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    for place, case in enumerate(cases):
        rank, result = run(case)
        with open(os.path.join(sys.argv[2], f"{place}-{rank}.json"), "w") as file:
            json.dump(result, file)
