"""Counts the collectives in the Ascend graphs of a block that is cut over two ranks, as rank_<r>.json.

Argument: the folder for the results. Exporting compiles the front end alone: nothing runs.
"""

import json
import pathlib
import sys

from telechat.parallel.mesh import Mesh
from telechat.parallel.parallel_config import ParallelConfig

mesh = Mesh.create(ParallelConfig(tensor=2))

import mindspore as ms  # noqa: E402  (the mesh first: msrun's scheduler goes no further than it)
import numpy as np  # noqa: E402
from mindspore import Tensor  # noqa: E402

from telechat.nn.block_graphs import Attention, FeedForward  # noqa: E402
from telechat.parallel import collectives  # noqa: E402
from telechat.parallel.stage import build_stage, read_random  # noqa: E402
from tests.ascend.conftest import Method  # noqa: E402
from tests.ascend.mindir import export  # noqa: E402
from tests.test_model import small_config  # noqa: E402

ROWS, HIDDEN, INNER = 32, 64, 48
COLLECTIVES = ("AllReduce", "AllGather", "ReduceScatter")


def ones(*shape):
    return Tensor(np.ones(shape, np.float32)).astype(ms.bfloat16)


def collectives_of(graph):
    """Each collective's name and arguments, in order."""
    return [[operation.name, {name: operation.attributes[name] for name in ("group", "op", "rank_size")
                              if name in operation.attributes and operation.attributes[name] != ""}]
            for operation in graph.operations if operation.name in COLLECTIVES]


collectives.is_native = lambda: True
config = small_config(hidden_size=HIDDEN, num_key_value_heads=2, ffn_hidden_size=INNER)
results = {"group": mesh.tensor.name}
for name, sequence_parallel in (("tensor", False), ("sequence", True)):
    parallel = ParallelConfig(tensor=2, sequence_parallel=sequence_parallel)
    stage = build_stage(config, "bfloat16", mesh, parallel, read_random(config, 0), "ascend")
    functions = stage.functions
    weights = [None if weight is None else weight.data for weight in stage.blocks[0].weights()]
    own = ROWS // 2 if sequence_parallel else ROWS
    cos = ones(1, 1, ROWS // 2, 16)
    tables = (cos, cos, *stage.kernels.attention_tensors(config, ROWS // 2, heads=slice(0, 2)))
    x, half, inner = ones(own, HIDDEN), ones(ROWS, 32), ones(ROWS, INNER // 2)
    heads = [ones(2, ROWS // 2, count, 16) for count in (2, 1, 1)]  # of queries, keys, values
    attention, feed_forward = Attention(functions), FeedForward(functions)
    last = (*tables, None, None, *weights[:5])
    forward = [export(Method(attention, "forward"), x, *last), export(Method(feed_forward, "forward_rows"), x, None, *weights[5:])]
    backward = [export(Method(feed_forward, "backward_rows"), x, x, inner, inner, None, *weights[5:]),
                export(Method(attention, "backward"), x, x, *heads, None, half, *last)]
    results[name] = {
        "forward": [found for graph in forward for found in collectives_of(graph)],
        "backward": [found for graph in backward for found in collectives_of(graph)],
        "heads": [forward[0].named("FlashAttentionScore")[0].constants[10],
                  backward[1].named("FlashAttentionScoreGrad")[0].constants[-8]],
        "recomputed": [sum(graph.counts().get(name, 0) for graph in backward)
                       for name in ("FlashAttentionScore", "RmsNorm", "Swiglu")]}
(pathlib.Path(sys.argv[1]) / f"rank_{mesh.rank}.json").write_text(json.dumps(results))
