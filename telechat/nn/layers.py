"""Cells that hold the parameters of a layer under their published names."""

from mindspore import nn

from telechat.nn import kernels


def scope(make, name):
    """``make`` for the parameters below ``name``: scope(make, "query")("weight", …) makes "query.weight"."""
    return lambda parameter, shape: make(f"{name}.{parameter}", shape)


class Embedding(nn.Cell):
    """Token embedding: ``weight`` (vocabulary, hidden)."""

    def __init__(self, make, vocabulary, hidden):
        super().__init__()
        self.weight = make("weight", (vocabulary, hidden))

    def construct(self, input_ids, dtype):
        return kernels.embedding(input_ids, self.weight, dtype)


class Linear(nn.Cell):
    """``weight`` (outputs, inputs) and, where the model has one, ``bias`` (outputs,)."""

    def __init__(self, make, inputs, outputs, bias=False):
        super().__init__()
        self.weight = make("weight", (outputs, inputs))
        self.bias = make("bias", (outputs,)) if bias else None

    def construct(self, x):
        return kernels.linear(x, self.weight, self.bias)


class RMSNorm(nn.Cell):
    """``weight`` (hidden,)."""

    def __init__(self, make, hidden, epsilon):
        super().__init__()
        self.epsilon = epsilon
        self.weight = make("weight", (hidden,))

    def construct(self, x):
        return kernels.rms_norm(x, self.weight, self.epsilon)
