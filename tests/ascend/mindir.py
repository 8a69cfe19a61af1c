"""Compiled graphs without the device: a cell exported as MINDIR and read back.

Exporting runs MindSpore's front end alone: shapes, dtypes and gradients of Ascend operations are
inferred, and nothing is computed.
"""

import contextlib
import os
import pathlib
import tempfile
import typing

import mindspore as ms
from mindspore.train import mind_ir_pb2

# What does not become a kernel on the device: views, and what the compiler needs for itself.
NO_KERNELS = {"Reshape", "TupleGetItem", "MakeTuple", "Depend", "UpdateState", "Load", "TensorToTuple", "StopGradient",
              "ExpandDims", "Return"}
DTYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64",
          16: "bfloat16"}


class Operation(typing.NamedTuple):
    """One operation of a graph."""

    name: str
    inputs: list  # names
    constants: list  # the value of each input where it is a constant, else None
    outputs: list  # (dtype, shape) of each result
    result: str  # name of the result
    attributes: dict


class Graph:
    """What an exported cell consists of.

    Attributes:
        operations: list of `Operation`, in the order of the file.
        constants: (dtype, shape) of each tensor that the graph itself holds.
    """

    def __init__(self, model):
        self.operations = []
        self.constants = [_type(tensor) for tensor in model.graph.parameter]
        self.types = {}
        primitives = {primitive.name: primitive for primitive in model.primitives}
        for graph in (model.graph, *model.functions):
            self.types.update({value.name: _type(value.tensor[0]) for value in graph.input if value.tensor})
            constants = {}
            for node in graph.node:
                if node.op_type == "Constant":
                    constants[node.output[0]] = node.attribute[0]
                    self.constants += [_type(tensor) for tensor in node.attribute[0].tensors]
                elif node.op_type.startswith("REF::"):
                    self._add(node, primitives[node.op_type[len("REF::"):]], constants)

    def _add(self, node, primitive, constants):
        outputs = [_type(tensor) for attribute in node.attribute if attribute.name == "shape"
                   for tensor in _tensors(attribute)]
        values = [_plain(constants[name]) if name in constants else None for name in node.input]
        attributes = {attribute.name: _plain(attribute) for attribute in primitive.attribute}
        self.operations.append(Operation(primitive.op_type, list(node.input), values, outputs, node.output[0],
                                         attributes))
        if len(outputs) == 1:
            self.types[node.output[0]] = outputs[0]

    def named(self, name):
        """The operations of one name."""
        return [operation for operation in self.operations if operation.name == name]

    def counts(self):
        """How often each operation occurs that becomes a kernel on the device."""
        names = [operation.name for operation in self.operations if operation.name not in NO_KERNELS]
        return {name: names.count(name) for name in sorted(set(names))}

    def kernels(self):
        """How many operations become kernels."""
        return sum(self.counts().values())


def export(cell, *inputs):
    """The `Graph` of a cell for these inputs."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # a failure leaves files where it happens
        ms.export(cell, *inputs, file_name="graph", file_format="MINDIR")
        model = mind_ir_pb2.ModelProto()
        file = next(path for path in pathlib.Path(folder).rglob("*.mindir"))
        model.ParseFromString(file.read_bytes())
        graph = Graph(model)
        graph.size = os.path.getsize(file)
    return graph


def _type(tensor):
    return DTYPES.get(tensor.data_type, tensor.data_type), tuple(tensor.dims)


def _tensors(attribute):
    return [*attribute.tensors, *(tensor for value in attribute.values for tensor in _tensors(value))]


def _plain(attribute):
    """A constant as a number, string, boolean or list of such; "none" for None; else its type."""
    kinds = type(attribute)
    if attribute.type in (kinds.TUPLE, kinds.LIST):
        return [_plain(value) for value in attribute.values]
    if attribute.type == kinds.STRING:
        return attribute.s.decode(errors="replace")
    if attribute.type in (kinds.FLOAT, kinds.DOUBLE):
        values = [*attribute.floats, *attribute.doubles]
        return values[0] if values else attribute.f or attribute.d
    if attribute.type == kinds.BOOL:
        return bool(attribute.i)
    if attribute.type in (kinds.INT32, kinds.INT64):
        return attribute.ints[0] if attribute.ints else attribute.i
    return kinds.AttributeType.Name(attribute.type).lower()
