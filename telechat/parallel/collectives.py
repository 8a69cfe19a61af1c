"""Collectives between the ranks of a `Group`, with the gradients that parallel layers need.

The one place besides nn/kernels.py that asks which device runs it. On Ascend everything is the native
primitive. In a compiled graph on CPU only the sum of float32 and float16 exists, so the rest is built
from it: bfloat16 in float32, a gather as the sum of tensors that are zero outside each rank's own
slot, a maximum as a local one over a gather. Results and gradients are the same.

Cells are for compiled graphs (and work outside them); the functions at the end are for outside only.
The gradients are written out because the built-in one of AllReduce is AllReduce, which counts the
gradient of a replicated tensor once for every rank.

Never call ``.recompute()`` on one of these Cells: it drops ``bprop``; recompute the block around them.
"""

import typing

import mindspore as ms
from mindspore import Tensor, mint, nn, ops
from mindspore.ops import ReduceOp
from mindspore.ops.auto_generate import DistCommIrecv, DistCommIsend

_isend = DistCommIsend()
_irecv = DistCommIrecv()


def is_native():
    """Whether this device has the native collectives (all but the CPU have)."""
    return ms.get_context("device_target") != "CPU"


# ---- What compiled graphs are made of: the primitives, or their equivalents on CPU.


class _InFloat32(nn.Cell):
    """``operation``, with bfloat16 done in float32."""

    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def construct(self, x):
        if x.dtype == ms.bfloat16:
            return self.operation(x.astype(ms.float32)).astype(x.dtype)
        return self.operation(x)


class _Gather(nn.Cell):
    """AllGather along axis 0. Exact, infinities and NaN included: every element is added to zeros only."""

    def __init__(self, group):
        super().__init__()
        self.sum = ops.AllReduce(ReduceOp.SUM, group.name)
        self.before = group.rank
        self.after = group.size - 1 - group.rank

    def construct(self, x):
        zeros = ops.zeros_like(x)
        return self.sum(ops.concat((zeros,) * self.before + (x,) + (zeros,) * self.after, 0))


class _OwnRows(nn.Cell):
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


class _Scatter(nn.Cell):
    """ReduceScatter SUM along axis 0."""

    def __init__(self, group):
        super().__init__()
        self.sum = ops.AllReduce(ReduceOp.SUM, group.name)
        self.own_rows = _OwnRows(group)

    def construct(self, x):
        return self.own_rows(self.sum(x))


class _Max(nn.Cell):
    """AllReduce MAX: the maximum over a gather, so that any values are right, negative ones included."""

    def __init__(self, group):
        super().__init__()
        self.gather = _Gather(group)
        self.max = ops.ReduceMax()

    def construct(self, x):
        return self.max(self.gather(x.reshape((1,) + x.shape)), 0)


class _Operations(typing.NamedTuple):
    """What the ranks of a group do with each other, each x → y."""

    sum: typing.Callable
    max: typing.Callable
    gather: typing.Callable
    scatter: typing.Callable
    own_rows: typing.Callable


def _operations(group, native):
    """The operations of ``group``: this device's, or native ones or CPU's where ``native`` is a bool."""
    if group.size == 1:
        return _Operations(*(nn.Identity() for _ in _Operations._fields))
    if is_native() if native is None else native:
        return _Operations(ops.AllReduce(ReduceOp.SUM, group.name), ops.AllReduce(ReduceOp.MAX, group.name),
                           ops.AllGather(group.name), ops.ReduceScatter(ReduceOp.SUM, group.name), _OwnRows(group))
    return _Operations(*map(_InFloat32, (ops.AllReduce(ReduceOp.SUM, group.name), _Max(group), _Gather(group),
                                         _Scatter(group), _OwnRows(group))))


# ---- For compiled graphs: float32, float16 or bfloat16 of any rank; cut along axis 0.
# ``native`` chooses the device's side, by default that of this device.


class _Exchange(nn.Cell):
    """One operation forward and another one backward."""

    def __init__(self, forward, backward):
        super().__init__()
        self.forward = forward
        self.backward = backward

    def construct(self, x):
        return self.forward(x)

    def bprop(self, x, out, dout):
        return (self.backward(dout),)


class CopyTo(_Exchange):
    """A replicated tensor enters a tensor-parallel region: identity; the gradient is summed.

    "f" of Megatron-LM (arXiv:1909.08053, section 3).
    """

    def __init__(self, group, native=None):
        super().__init__(nn.Identity(), _operations(group, native).sum)


class ReduceFrom(_Exchange):
    """Partial results leave a tensor-parallel region: summed; the gradient passes as it is.

    "g" of Megatron-LM (arXiv:1909.08053, section 3).
    """

    def __init__(self, group, native=None):
        super().__init__(_operations(group, native).sum, nn.Identity())


class GatherRows(_Exchange):
    """(N, …) of every rank → (N·size, …) in rank order; of the summed gradient, own rows.

    From the sequence-parallel into the tensor-parallel region: "g" of arXiv:2205.05198, section 4.2.2.
    """

    def __init__(self, group, native=None):
        operations = _operations(group, native)
        super().__init__(operations.gather, operations.scatter)


class ScatterRows(_Exchange):
    """(N, …) → own rows (N/size, …) of the sum; the gradient is gathered.

    From the tensor-parallel into the sequence-parallel region: "ḡ" of arXiv:2205.05198, section 4.2.2.
    """

    def __init__(self, group, native=None):
        operations = _operations(group, native)
        super().__init__(operations.scatter, operations.gather)


class SplitRows(_Exchange):
    """A replicated (N, …) → own rows (N/size, …); the gradient is gathered.

    From a replicated into the sequence-parallel region.
    """

    def __init__(self, group, native=None):
        operations = _operations(group, native)
        super().__init__(operations.own_rows, operations.gather)


class UnsplitRows(_Exchange):
    """(N, …) of every rank → (N·size, …) in rank order; own rows of the gradient.

    Out of the sequence-parallel region where all ranks do the same with the result, so that each has
    the whole gradient already.
    """

    def __init__(self, group, native=None):
        operations = _operations(group, native)
        super().__init__(operations.gather, operations.own_rows)


class _Detached(nn.Cell):
    """An operation that no gradient flows through."""

    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def construct(self, x):
        return ops.stop_gradient(self.operation(ops.stop_gradient(x)))


class AllReduceSum(_Detached):
    """The sum over the ranks; no gradient flows through it."""

    def __init__(self, group, native=None):
        super().__init__(_operations(group, native).sum)


class AllReduceMax(_Detached):
    """The elementwise maximum over the ranks; no gradient flows through it."""

    def __init__(self, group, native=None):
        super().__init__(_operations(group, native).max)


# ---- Outside compiled graphs.


def all_reduce(tensor, group):
    """The sum of ``tensor`` over the ranks, a new Tensor; any float dtype, int32 or int64."""
    if group.size == 1:
        return tensor
    result = tensor.copy()
    mint.distributed.all_reduce(result, group=group.name)
    return result


def all_gather_rows(tensor, group):
    """(N, …) of every rank → (N·size, …) in rank order."""
    if group.size == 1:
        return tensor
    if is_native():
        result = mint.empty((tensor.shape[0] * group.size, *tensor.shape[1:]), dtype=tensor.dtype)
        mint.distributed.all_gather_into_tensor(result, tensor, group=group.name)
        return result
    parts = [ops.zeros_like(tensor) for _ in group.ranks]
    mint.distributed.all_gather(parts, tensor, group=group.name)
    return ops.concat(parts, 0)


def reduce_scatter_rows(tensor, group):
    """(N, …) → own rows (N/size, …) of the sum over the ranks."""
    if group.size == 1:
        return tensor
    if tensor.shape[0] % group.size != 0:
        raise ValueError(f"{tensor.shape[0]} rows cannot be cut into {group.size} equal parts")
    rows = tensor.shape[0] // group.size
    if is_native():
        result = mint.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype)
        mint.distributed.reduce_scatter_tensor(result, tensor, group=group.name)
        return result
    return all_reduce(tensor, group)[group.rank * rows:(group.rank + 1) * rows]


def broadcast(tensor, source, group):
    """The ``tensor`` of the rank at place ``source`` of the group; shape and dtype equal on all."""
    if group.size == 1:
        return tensor
    result = tensor.copy()
    mint.distributed.broadcast(result, group.ranks[source], group=group.name)
    return result


class Sending:
    """A message on its way; keeps its tensor alive until ``wait()`` has returned."""

    def __init__(self, tensor, handle):
        self.tensor = tensor
        self.handle = handle

    def wait(self):
        """Return when the tensor may be changed."""
        if self.handle is not None:
            self.handle.wait()
        self.tensor = self.handle = None


def _channel(group, sender, receiver):
    """Messages to lower ranks go through the group's return group, if it has one (mesh.py says why)."""
    return group.return_name if group.return_name and receiver < sender else group.name


def send(tensor, peer, group):
    """Start sending ``tensor`` to the rank at place ``peer`` of the group; returns a `Sending`.

    Never waits for the receiver, so two ranks may send to each other before they receive, and several
    messages may be under way: they arrive in the order sent. On CPU everything between two ranks
    arrives in one order, collectives included and whatever the group: receive a message before the
    next collective that both ranks take part in, or the collective silently takes it for its own.
    """
    handle = _handle(_isend(tensor, peer, _channel(group, group.rank, peer), 0))
    if not is_native():
        # Copied and queued by now; waiting keeps it ahead of a compiled graph's collectives.
        handle.wait()
        handle = None
    return Sending(tensor, handle)


def receive(shape, dtype, peer, group):
    """The next tensor from the rank at place ``peer`` of the group; shape and dtype as it was sent.

    Waits for it; a peer that never sends is noticed only by msrun.
    """
    result = mint.empty(tuple(shape), dtype=dtype)
    _handle(_irecv(result, 0, peer, _channel(group, peer, group.rank))).wait()
    return result


def _handle(outputs):
    """The communication handle among what a point-to-point primitive returns."""
    return next(output for output in outputs if hasattr(output, "wait"))


def barrier(group):
    """Return when every rank of the group has called it."""
    if group.size > 1:
        # mint's own barrier works on CPU, but logs an error each time.
        all_reduce(Tensor([0.0], ms.float32), group).asnumpy()


def gather_objects(value, group):
    """The small picklable ``value`` of every rank, as a list in rank order."""
    if group.size == 1:
        return [value]
    values = [None] * group.size
    mint.distributed.all_gather_object(values, value, group=group.name)
    return values
