"""Cells that hold the parameters of a layer under their published names."""

from mindspore import nn


def scope(make, name):
    """``make`` for the parameters below ``name``: scope(make, "query")("weight", …) makes "query.weight"."""
    return lambda parameter, shape: make(f"{name}.{parameter}", shape)


def set_kernels(cell, kernels):
    """Let ``kernels`` compute in a cell and all below it that compute."""
    for _, inner in cell.cells_and_names():
        if hasattr(inner, "kernels"):
            inner.kernels = kernels


class Embedding(nn.Cell):
    """Token embedding: ``weight`` (vocabulary, hidden)."""

    def __init__(self, make, vocabulary, hidden, kernels):
        super().__init__()
        self.kernels = kernels
        self.weight = make("weight", (vocabulary, hidden))

    def construct(self, input_ids, dtype):
        return self.kernels.embedding(input_ids, self.weight, dtype)


class Linear(nn.Cell):
    """``weight`` (outputs, inputs) and, where the model has one, ``bias`` (outputs,)."""

    def __init__(self, make, inputs, outputs, bias=False):
        super().__init__()
        self.weight = make("weight", (outputs, inputs))
        self.bias = make("bias", (outputs,)) if bias else None


class RMSNorm(nn.Cell):
    """``weight`` (hidden,)."""

    def __init__(self, make, hidden, epsilon, kernels):
        super().__init__()
        self.kernels = kernels
        self.epsilon = epsilon
        self.weight = make("weight", (hidden,))

    def construct(self, x):
        return self.kernels.rms_norm(x, self.weight, self.epsilon)
