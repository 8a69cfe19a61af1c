"""Exports the Ascend side of every collective and stores what the graphs hold, as rank_<r>.json.

Argument: the folder for the results. Exporting compiles the front end alone: nothing runs.
"""

import json
import pathlib
import sys

from telechat.parallel.mesh import Mesh
from telechat.parallel.parallel_config import ParallelConfig

mesh = Mesh.create(ParallelConfig(pipeline=2))
mesh = mesh.create_groups(separate_return=True)  # as on Ascend

import mindspore as ms  # noqa: E402  (the mesh first: msrun's scheduler goes no further than it)
from mindspore import nn, ops  # noqa: E402
from mindspore.train import mind_ir_pb2  # noqa: E402

from telechat.parallel import collectives  # noqa: E402

FOLDER = pathlib.Path(sys.argv[1])
ROWS = {"GatherRows": 8, "UnsplitRows": 8, "ScatterRows": 2, "SplitRows": 2}
group = mesh.pipeline
other = 1 - group.rank


class Gradient(nn.Cell):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell
        self.gradient = ops.GradOperation(sens_param=True)

    def construct(self, x, dy):
        return self.gradient(self.cell)(x, dy)


class Function(nn.Cell):
    """One of the functions for outside graphs, which are made of primitives that export too."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def construct(self, x):
        return self.function(x)


def all_reduce(x):
    return collectives.all_reduce(x, group)


def all_gather_rows(x):
    return collectives.all_gather_rows(x, group)


def reduce_scatter_rows(x):
    return collectives.reduce_scatter_rows(x, group)


def broadcast(x):
    # Its outputs hold something that has no place in a file.
    return ops.depend(x, collectives._start_broadcast(x, 1, group))


def send(x):
    return collectives._start_send(x, other, group)


def receive(x):
    return collectives._start_receive(x, other, group)


def operations(cell, *inputs):
    """The operations of a cell's graph in order: name, attributes, constant inputs."""
    file = f"graph_{mesh.rank}.mindir"
    ms.export(cell, *inputs, file_name=file, file_format="MINDIR")
    model = mind_ir_pb2.ModelProto()
    model.ParseFromString(pathlib.Path(file).read_bytes())
    primitives = {primitive.name: primitive for primitive in model.primitives}
    found = []
    for graph in [model.graph, *model.functions]:
        constants = {node.output[0]: node.attribute[0] for node in graph.node if node.op_type == "Constant"}
        for node in graph.node:
            if not node.op_type.startswith("REF::"):
                continue
            primitive = primitives[node.op_type[len("REF::"):]]
            attributes = {attribute.name: attribute.s.decode() or attribute.i for attribute in primitive.attribute
                          if attribute.name in ("group", "op", "rank_size")}
            values = [plain(constants[name]) for name in node.input if name in constants]
            found.append([primitive.op_type, attributes, [value for value in values if value is not None]])
    return found


def plain(constant):
    """A string, a whole number, a list of such or, for anything else, None."""
    if constant.type == constant.TUPLE:
        return [plain(value) for value in constant.values]
    if constant.type == constant.STRING:
        return constant.s.decode()
    if constant.type not in (constant.INT32, constant.INT64):
        return None
    return constant.ints[0] if constant.ints else constant.i  # within a tuple it is stored as a list


def tensor(rows):
    return ops.ones((rows, 2), ms.bfloat16)


graphs = {}
for name in ("CopyTo", "ReduceFrom", "GatherRows", "ScatterRows", "SplitRows", "UnsplitRows", "AllReduceSum",
             "AllReduceMax"):
    cell = getattr(collectives, name)(group, native=True)
    graphs[name] = {"forward": operations(cell, tensor(4)),
                    "backward": operations(Gradient(cell), tensor(4), tensor(ROWS.get(name, 4)))}
collectives.is_native = lambda: True
for function in (all_reduce, all_gather_rows, reduce_scatter_rows, broadcast, send, receive):
    graphs[function.__name__] = operations(Function(function), tensor(4))
graphs["group"] = [group.name, group.return_name]
(FOLDER / f"rank_{mesh.rank}.json").write_text(json.dumps(graphs))
