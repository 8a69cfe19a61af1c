"""What collectives.py uses in compiled graphs on CPU, built from the one collective that exists there.

That is AllReduce SUM of float32 and float16. Results equal the native primitives'.
"""

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops import ReduceOp


class InFloat32(nn.Cell):
    """``operation``, with bfloat16 done in float32: a CPU graph can neither sum nor slice bfloat16."""

    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def construct(self, x):
        if x.dtype == ms.bfloat16:
            return self.operation(x.astype(ms.float32)).astype(x.dtype)
        return self.operation(x)


class OwnRows(nn.Cell):
    """The slice along axis 0 that belongs to this rank; no communication."""

    def __init__(self, group):
        super().__init__()
        self.rank = group.rank
        self.size = group.size

    def construct(self, x):
        if x.shape[0] % self.size != 0:
            raise ValueError(f"{x.shape[0]} rows cannot be cut into {self.size} equal parts")
        rows = x.shape[0] // self.size
        return x[self.rank * rows:(self.rank + 1) * rows]


class Gather(nn.Cell):
    """AllGather along axis 0. Exact, infinities and NaN included: every element is added to zeros only."""

    def __init__(self, group):
        super().__init__()
        self.sum = ops.AllReduce(ReduceOp.SUM, group.name)
        self.before = group.rank
        self.after = group.size - 1 - group.rank

    def construct(self, x):
        zeros = ops.zeros_like(x)
        return self.sum(ops.concat((zeros,) * self.before + (x,) + (zeros,) * self.after, 0))


class Scatter(nn.Cell):
    """ReduceScatter SUM along axis 0."""

    def __init__(self, group):
        super().__init__()
        self.sum = ops.AllReduce(ReduceOp.SUM, group.name)
        self.own_rows = OwnRows(group)

    def construct(self, x):
        return self.own_rows(self.sum(x))


class Max(nn.Cell):
    """AllReduce MAX: the maximum over a gather, so that any values are right, negative ones included."""

    def __init__(self, group):
        super().__init__()
        self.gather = Gather(group)
        self.max = ops.ReduceMax()

    def construct(self, x):
        return self.max(self.gather(x.reshape((1,) + x.shape)), 0)
