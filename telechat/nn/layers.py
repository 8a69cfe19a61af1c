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
    """``weight`` (outputs, inputs), or the tensors of a quantised one, and, where the model has one, ``bias`` (outputs,).

    Attributes:
        adapter (tuple): what a LoRA adapter beside the weight adds for all rows, A, B and columns as
            `BlockFunctions.linear` takes them, Parameters (telechat/adapters/attached.py); None.
    """

    def __init__(self, make, inputs, outputs, bias=False):
        super().__init__()
        weight = make("weight", (outputs, inputs))
        self.is_quantised = isinstance(weight, tuple)
        if self.is_quantised:
            self.qweight, self.scales, self.order = weight if len(weight) == 3 else (*weight, None)
        else:
            self.weight = weight
        self.bias = make("bias", (outputs,)) if bias else None
        self.adapter = None

    @property
    def factor(self):
        """What `BlockFunctions.linear` takes as the weight."""
        weight = self._packed() if self.is_quantised else self.weight
        return weight if self.adapter is None else (weight, *self.adapter)

    def _packed(self):
        return (self.qweight, self.scales) if self.order is None else (self.qweight, self.scales, self.order)


class RMSNorm(nn.Cell):
    """``weight`` (hidden,)."""

    def __init__(self, make, hidden, epsilon, kernels):
        super().__init__()
        self.kernels = kernels
        self.epsilon = epsilon
        self.weight = make("weight", (hidden,))

    def construct(self, x):
        return self.kernels.rms_norm(x, self.weight, self.epsilon)
