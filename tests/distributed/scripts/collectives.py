"""Runs every collective on every group of a mesh and stores what went in and what came out.

Arguments: JSON of the ParallelConfig; folder for the results (rank_<r>.npz and rank_<r>.json); JSON lists of
[group, dtype, times] whose gradients and [group, dtype] whose exactness are to be checked.
The numbers are judged by tests/distributed/test_collectives.py, which knows what all ranks put in.
"""

import json
import os
import pathlib
import sys
import time

from telechat.parallel.mesh import Mesh
from telechat.parallel.parallel_config import ParallelConfig

mesh = Mesh.create(ParallelConfig(**json.loads(sys.argv[1])))

import mindspore as ms  # noqa: E402  (the mesh first: msrun's scheduler goes no further than it)
import numpy as np  # noqa: E402
from mindspore import Tensor, nn, ops  # noqa: E402

from telechat.parallel import collectives  # noqa: E402

FOLDER = pathlib.Path(sys.argv[2])
CELLS = ("CopyTo", "ReduceFrom", "GatherRows", "ScatterRows", "AllReduceSum", "AllReduceMax")
GROUPS = ("tensor", "data", "world", "pipeline")
# On a card a send waits for its receive, so that two ranks may send to each other first only where each direction has
# a group of its own: the pipeline's.
MESSAGES = ("pipeline",) if collectives.is_native() else GROUPS
results = {}
facts = {}


def store(name, tensor):
    results[name] = tensor.astype(ms.float64 if tensor.dtype == ms.int64 else ms.float32).asnumpy()


class Weighted(nn.Cell):
    """Σ over the collectives of Σ cell(cell(2·x))·w: its gradient in w is the result of the collective."""

    def __init__(self, cells, times):
        super().__init__()
        self.collectives = nn.CellList(cells)
        self.times = times

    def construct(self, *xs_and_ws):
        total = 0.0
        for i in range(len(self.collectives)):
            y = xs_and_ws[i] * 2
            for _ in range(self.times):
                y = self.collectives[i](y)
            total = total + (y * xs_and_ws[len(self.collectives) + i]).astype(ms.float32).sum()
        return total


class Gradient(nn.Cell):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.gradient = ops.GradOperation(get_all=True)

    def construct(self, *xs_and_ws):
        return self.gradient(self.net)(*xs_and_ws)


class CompiledGradient(Gradient):
    @ms.jit
    def construct(self, *xs_and_ws):
        return self.gradient(self.net)(*xs_and_ws)


class Compiled(nn.Cell):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    @ms.jit
    def construct(self, x):
        return self.cell(x)


def output_rows(cell, rows, size):
    """Rows that a collective makes of ``rows``."""
    return {"GatherRows": rows * size, "ScatterRows": rows // size}.get(cell, rows)


def check_gradients(kind, dtype, times):
    """All collectives in one function, each applied ``times`` times, in PyNative and compiled."""
    group = getattr(mesh, kind)
    random = np.random.default_rng([mesh.rank, GROUPS.index(kind), times])
    xs, ws = [], []
    for cell in CELLS:
        rows, expected = 16, 16
        for _ in range(times):
            expected = output_rows(cell, expected, group.size)
        xs.append(Tensor(random.standard_normal((rows, 3)), dtype))
        ws.append(Tensor(random.standard_normal((expected, 3)), dtype))
    net = Weighted([getattr(collectives, cell)(group) for cell in CELLS], times)
    eager, compiled = Gradient(net), CompiledGradient(net)
    # Twice: a compiled graph runs the same collectives again.
    for mode, gradient in (("eager", eager), ("compiled", compiled), ("again", compiled)):
        gradients = gradient(*xs, *ws)
        for cell, x, w, dx, y in zip(CELLS, xs, ws, gradients[:len(CELLS)], gradients[len(CELLS):]):
            for name, tensor in (("x", x), ("w", w), ("dx", dx), ("y", y)):
                store(f"{kind}/{cell}/{str(dtype).lower()}/{times}/{mode}/{name}", tensor)


class Exact(nn.Cell):
    """The collectives that only move or compare values."""

    def __init__(self, group):
        super().__init__()
        self.gather = collectives.GatherRows(group)
        self.max = collectives.AllReduceMax(group)

    @ms.jit
    def construct(self, x):
        return self.gather(x), self.max(x)


def check_exact(kind, dtype):
    """What must not change a bit: gathers and maxima of extreme values."""
    group = getattr(mesh, kind)
    values = np.array([[-np.inf, -1e30, -5, 1e-30, np.inf], [-3, 2, -1e-30, -np.inf, 0.25]])
    x = np.roll(values, mesh.rank, 1) - np.array([0, mesh.rank])[:, None]
    x[0, 0] = -7 - mesh.rank
    x = Tensor(x, dtype)
    store(f"{kind}/exact/{str(dtype).lower()}/x", x)
    for name, y in zip(("GatherRows", "AllReduceMax"), Exact(group)(x)):
        store(f"{kind}/exact/{str(dtype).lower()}/{name}", y)


def check_functions(kind, dtype):
    """The functions for outside compiled graphs."""
    group = getattr(mesh, kind)
    x = Tensor(np.random.default_rng(mesh.rank).integers(-50, 50, (8, 3)), dtype)
    before = x.astype(ms.float32).asnumpy().copy()
    store(f"{kind}/functions/{str(dtype).lower()}/x", x)
    for name in ("all_reduce", "all_gather_rows", "reduce_scatter_rows"):
        store(f"{kind}/functions/{str(dtype).lower()}/{name}", getattr(collectives, name)(x, group))
    for source in range(group.size):
        store(f"{kind}/functions/{str(dtype).lower()}/broadcast {source}", collectives.broadcast(x, source, group))
    facts[f"{kind}/{str(dtype).lower()}/argument unchanged"] = bool((x.astype(ms.float32).asnumpy() == before).all())


def check_messages(kind, dtype):
    """Every rank sends three messages to every other one before it receives any."""
    group = getattr(mesh, kind)
    peers = [peer for peer in range(group.size) if peer != group.rank]
    sending = [collectives.send(Tensor(message(group.rank, peer, number), dtype), peer, group)
               for number in range(3) for peer in peers]
    right = []
    for peer in reversed(peers):
        for number in range(3):
            expected = message(peer, group.rank, number)
            y = collectives.receive(expected.shape, dtype, peer, group)
            right.append(bool((y.astype(ms.float32).asnumpy() == expected).all()))
    for handle in sending:
        handle.wait()
    facts[f"{kind}/{str(dtype).lower()}/messages"] = right


def check_afterwards(kind):
    """Collectives between the same ranks, compiled or not, are not disturbed by the messages before."""
    group = getattr(mesh, kind)
    total = float(sum(range(1, group.size + 1)))
    one = Tensor([group.rank + 1.0])
    facts[f"{kind}/afterwards"] = [
        float(value.asnumpy()[0]) == total
        for value in (Compiled(collectives.ReduceFrom(group))(one), collectives.all_reduce(one, group))]


def message(sender, receiver, number):
    """The number-th message between two ranks; each is of another shape."""
    return np.full((number + 1, 2), 16 * sender + 4 * receiver + number, np.float32)


def check_pipeline(micro_batches):
    """1F1B over all ranks: activations gain one a stage, gradients twice that; each is 1 MB.

    Every stage sends both ways before it receives, which a transfer that waits for its receiver
    would not survive.
    """
    group = mesh.pipeline if collectives.is_native() else mesh.world
    first, last = group.rank == 0, group.rank == group.size - 1
    shape, seen = (256, 1024), {"forward": [], "backward": []}
    sending = []

    def forward(number):
        x = Tensor(np.full(shape, 100 * number, np.float32))
        if not first:
            x = collectives.receive(shape, ms.float32, group.rank - 1, group)
        seen["forward"].append(float(x.asnumpy().mean()))
        if not last:
            sending.append(collectives.send(x + 1, group.rank + 1, group))

    def backward(number):
        dy = Tensor(np.full(shape, 1000 * number, np.float32))
        if not last:
            dy = collectives.receive(shape, ms.float32, group.rank + 1, group)
        seen["backward"].append(float(dy.asnumpy().mean()))
        if not first:
            sending.append(collectives.send(dy + 2, group.rank - 1, group))

    ahead = min(group.size - 1 - group.rank, micro_batches)
    for number in range(ahead):
        forward(number)
    for number in range(ahead, micro_batches):
        forward(number)
        backward(number - ahead)
    for number in range(micro_batches - ahead, micro_batches):
        backward(number)
    for handle in sending:
        handle.wait()
    facts["one forward one backward"] = seen


def check_barrier():
    """The file that rank 0 writes before it joins is there for all who have passed.

    It comes late: the others must wait for longer than the time-out that ends jobs with a dead rank.
    """
    marker = FOLDER / "marker"
    if mesh.rank == 0:
        time.sleep(float(os.environ["MS_NODE_TIMEOUT"]) + 1 if mesh.size == 2 else 0.5)
        marker.write_text("")
    collectives.barrier(mesh.world)
    facts["barrier"] = marker.exists()


def check_refusals():
    """Rows that the ranks cannot share are refused, inside a graph and outside, without a message sent."""
    x = Tensor(np.ones((2 * mesh.world.size + 1, 2), np.float32))
    facts["refused"] = []
    for attempt in (Compiled(collectives.ScatterRows(mesh.world)),
                    lambda value: collectives.reduce_scatter_rows(value, mesh.world)):
        try:
            attempt(x)
        except ValueError as error:
            facts["refused"].append(str(error).splitlines()[0])


for kind, dtype, times in json.loads(sys.argv[3]):
    check_gradients(kind, getattr(ms, dtype), times)
for kind, dtype in json.loads(sys.argv[4]):
    check_exact(kind, getattr(ms, dtype))
for kind in GROUPS:
    for dtype in (ms.float32, ms.float16, ms.bfloat16, ms.int32, ms.int64):
        check_functions(kind, dtype)
        if kind in MESSAGES:
            check_messages(kind, dtype)
    check_afterwards(kind)
check_pipeline(6)
check_barrier()
check_refusals()
facts["objects"] = collectives.gather_objects({"rank": mesh.rank, "text": "智" * mesh.rank}, mesh.world)
facts["groups"] = {kind: getattr(mesh, kind).ranks for kind in GROUPS}
np.savez(FOLDER / f"rank_{mesh.rank}.npz", **results)
(FOLDER / f"rank_{mesh.rank}.json").write_text(json.dumps(facts))
