"""Collectives between the ranks of a `Group`, with the gradients that parallel layers need.

The one place besides nn/kernels.py that asks which device runs it: on Ascend everything is the native
primitive, on CPU what that lacks is built in cpu_collectives.py, with the same results and gradients.

Cells are for compiled graphs (and work outside them); the functions at the end are for outside only.
The gradients are written out because the built-in one of AllReduce is AllReduce, which counts the
gradient of a replicated tensor once for every rank.

Never call ``.recompute()`` on one of these Cells: it drops ``bprop``; recompute the block around them.
"""

import typing

import mindspore as ms
from mindspore import Tensor, mint, nn, ops
from mindspore.ops import ReduceOp, auto_generate

from telechat.parallel import cpu_collectives as cpu

_isend = auto_generate.DistCommIsend()
_irecv = auto_generate.DistCommIrecv()
_all_reduce = auto_generate.DistCommAllReduce()
_all_gather = auto_generate.DistCommAllGather()
_all_gather_into_tensor = auto_generate.DistCommAllGatherIntoTensor()
_reduce_scatter = auto_generate.DistCommReduceScatterTensor()
_broadcast = auto_generate.DistCommBroadcast()


def is_native():
    """Whether this device has the native collectives (all but the CPU have)."""
    return ms.get_context("device_target") != "CPU"


class _Operations(typing.NamedTuple):
    """What the ranks of a group do with each other in a compiled graph, each x → y."""

    sum: typing.Callable
    max: typing.Callable
    gather: typing.Callable
    scatter: typing.Callable


def _operations(group, native):
    """The operations of ``group``: this device's, or native ones or CPU's where ``native`` is a bool."""
    if group.size == 1:
        return _Operations(*(nn.Identity() for _ in _Operations._fields))
    if is_native() if native is None else native:
        return _Operations(ops.AllReduce(ReduceOp.SUM, group.name), ops.AllReduce(ReduceOp.MAX, group.name),
                           ops.AllGather(group.name), ops.ReduceScatter(ReduceOp.SUM, group.name))
    return _Operations(*map(cpu.InFloat32, (ops.AllReduce(ReduceOp.SUM, group.name), cpu.Max(group),
                                            cpu.Gather(group), cpu.Scatter(group))))


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


# ---- Outside compiled graphs: float32, float16, bfloat16, int32 or int64. The argument is never changed;
# in a group of one the result is the argument itself.


def all_reduce(tensor, group):
    """The sum of ``tensor`` over the ranks."""
    if group.size == 1:
        return tensor
    result = _copy(tensor)
    _all_reduce(result, ReduceOp.SUM, group.name, False)
    return result


def all_gather_rows(tensor, group):
    """(N, …) of every rank → (N·size, …) in rank order."""
    if group.size == 1:
        return tensor
    if is_native():
        result = mint.empty((tensor.shape[0] * group.size,) + tensor.shape[1:], dtype=tensor.dtype)
        _all_gather_into_tensor(result, tensor, group.size, group.name, False)
        return result
    parts = [mint.empty(tensor.shape, dtype=tensor.dtype) for _ in group.ranks]
    _all_gather(parts, tensor, group.size, group.name, False)
    return ops.concat(parts, 0)


def reduce_scatter_rows(tensor, group):
    """(N, …) → own rows (N/size, …) of the sum over the ranks."""
    if group.size == 1:
        return tensor
    if tensor.shape[0] % group.size != 0:
        raise ValueError(f"{tensor.shape[0]} rows cannot be cut into {group.size} equal parts")
    rows = tensor.shape[0] // group.size
    if is_native():
        result = mint.empty((rows,) + tensor.shape[1:], dtype=tensor.dtype)
        _reduce_scatter(result, tensor, group.size, ReduceOp.SUM, group.name, False)
        return result
    return all_reduce(tensor, group)[group.rank * rows:(group.rank + 1) * rows]


def broadcast(tensor, source, group):
    """The ``tensor`` of the rank at place ``source`` of the group; shape and dtype equal on all ranks."""
    if group.size == 1:
        return tensor
    result = _copy(tensor)
    _start_broadcast(result, source, group)
    return result


def _copy(tensor):
    if is_native():
        return mint.clone(tensor)
    # Tensor.copy computes x / 1.0 in float32, 25 times as slow; the CPU cannot copy bfloat16 otherwise.
    return tensor.copy() if tensor.dtype == ms.bfloat16 else ops.deepcopy(tensor)


class Sending:
    """A message on its way; keeps its tensor alive until ``wait()`` has returned."""

    def __init__(self, tensor, handle):
        self.tensor = tensor
        self.handle = handle

    def wait(self):
        """Return when the tensor may be changed."""
        self.handle.wait()
        self.tensor = None


def send(tensor, peer, group):
    """Start sending ``tensor`` to the rank at place ``peer`` of the group; returns a `Sending`.

    Never waits for the receiver: two ranks may send to each other before they receive, and several
    messages may be under way; they arrive in the order sent. On Ascend the first is so in the pipeline's group
    alone, which has a group for each direction: in one group HCCL's send holds back what follows until it is
    received. On CPU everything between two ranks
    arrives in one order, collectives included and whatever the group: a message must be received
    before the next collective that both ranks take part in, which would take it for its own.
    """
    sending = Sending(tensor, _handle(_start_send(tensor, peer, group)))
    if not is_native():
        # The message is copied and queued by then, ahead of any collective of a compiled graph.
        sending.handle.wait()
    return sending


def receive(shape, dtype, peer, group):
    """The next tensor from the rank at place ``peer`` of the group, of the shape and dtype it was sent in.

    Waits for it. A peer that has died never answers: msrun then ends this process.
    """
    result = mint.empty(tuple(shape), dtype=dtype)
    _handle(_start_receive(result, peer, group)).wait()
    return result


def _start_broadcast(result, source, group):
    return _broadcast(result, source, group.rank, group.name, False)


def _start_send(tensor, peer, group):
    return _isend(tensor, peer, _channel(group, group.rank, peer), 0)


def _start_receive(result, peer, group):
    return _irecv(result, 0, peer, _channel(group, peer, group.rank))


def _channel(group, sender, receiver):
    """Messages to lower ranks go through the group's return group, if it has one (mesh.py says why)."""
    return group.return_name if group.return_name and receiver < sender else group.name


def _handle(outputs):
    """The communication handle among what a point-to-point primitive returns."""
    return next(output for output in outputs if hasattr(output, "wait"))


def barrier(group):
    """Return when every rank of the group has called it."""
    if group.size > 1:
        # mint's own barrier works on CPU, but logs an error each time.
        all_reduce(Tensor([0.0], ms.float32), group).asnumpy()


def gather_objects(value, group):
    """The ``value`` of every rank, as a list in rank order: numbers, strings, lists, dicts; small ones."""
    if group.size == 1:
        return [value]
    values = [None] * group.size
    mint.distributed.all_gather_object(values, value, group=group.name)
    return values
