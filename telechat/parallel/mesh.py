"""The mesh of processes: pipeline × data × tensor, and the groups that communicate along each axis.

Tensor-parallel ranks are neighbours, because they talk most: rank = (pp·data + dp)·tensor + tp, the
order of Megatron-LM (arXiv:2104.04473, section 3).
"""

import dataclasses
import itertools
import math
import os

from telechat.errors import InputError
from telechat.parallel.parallel_config import process_count
from telechat.parallel.rendezvous import meet

_created = set()  # names of the groups that exist in this process
KINDS = ("tensor", "data", "pipeline", "world", "embedding")


@dataclasses.dataclass(frozen=True)
class Group:
    """Ranks that communicate with each other.

    A group of one has no name and needs no communication: every collective on it is the identity.
    """

    name: str  # MindSpore's group name; None for a group of one
    ranks: tuple  # global ranks, ascending
    rank: int  # this process's place in ``ranks``
    size: int
    return_name: str = None  # a second group of the same ranks, for messages to lower ranks; None: the same


def groups_of(size, pipeline, data, tensor):
    """All groups of a mesh of ``size`` = pipeline·data·tensor ranks.

    Returns:
        dict: kind → list of tuples of global ranks; each kind holds every rank exactly once. "tensor",
        "data", "pipeline": the ranks that differ in that coordinate only. "world": all. "embedding":
        the first and last stage's ranks with the same data and tensor coordinate; every rank of a
        middle stage, and every rank of a mesh without pipeline, is a group of its own.
    """
    def rank(pp, dp, tp):
        return (pp * data + dp) * tensor + tp

    stages, copies, parts = range(pipeline), range(data), range(tensor)
    ends = sorted({0, pipeline - 1})
    return {
        "tensor": [tuple(rank(pp, dp, tp) for tp in parts) for pp in stages for dp in copies],
        "data": [tuple(rank(pp, dp, tp) for dp in copies) for pp in stages for tp in parts],
        "pipeline": [tuple(rank(pp, dp, tp) for pp in stages) for dp in copies for tp in parts],
        "world": [tuple(range(size))],
        "embedding": [
            *(tuple(rank(pp, dp, tp) for pp in ends) for dp in copies for tp in parts),
            *((rank(pp, dp, tp),) for pp in stages if pp not in ends for dp in copies for tp in parts)],
    }


def group_name(ranks):
    """MindSpore's name for the group of evenly spaced ``ranks``: equal ranks share one communicator.

    First rank, step and count instead of all the ranks: HCCL allows 127 characters.
    """
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 0
    return f"ranks_from_{ranks[0]}_by_{step}_count_{len(ranks)}"


def mesh_shape(parallel, size):
    """(pipeline, data, tensor) of a `ParallelConfig` on ``size`` processes, ``data`` filled in.

    Raises:
        InputError: the product is not ``size``; the message names the nearest that fit.
    """
    pipeline, tensor = parallel.pipeline, parallel.tensor
    data = parallel.data
    if data is None and size % (pipeline * tensor) == 0:
        data = size // (pipeline * tensor)
    if data is not None and pipeline * data * tensor == size:
        return pipeline, data, tensor
    unit = pipeline * tensor * (data or 1)
    if data is None:
        asked = f"tensor {tensor} × pipeline {pipeline} needs a multiple of {unit} processes"
        counts = sorted({max(size // unit, 1) * unit, (size // unit + 1) * unit})
    else:
        asked = f"tensor {tensor} × pipeline {pipeline} × data {data} needs {unit} processes"
        counts = [unit]
    near_pipeline, near_data, near_tensor = _nearest_shape(size, pipeline, data, tensor)
    raise InputError(
        f"parallel: {asked}, and there are {size}; start {' or '.join(map(str, counts))} processes, or with {size} "
        f"set tensor {near_tensor}, pipeline {near_pipeline}, data {near_data}")


def _nearest_shape(size, pipeline, data, tensor):
    """The (pipeline, data, tensor) with product ``size`` closest to the one asked, by ratio."""
    def distance(shape):
        wanted = (pipeline, shape[1] if data is None else data, tensor)
        return sum(abs(math.log(have / want)) for have, want in zip(shape, wanted)), -shape[2], shape[0]

    divisors = [count for count in range(1, size + 1) if size % count == 0]
    shapes = [(pp, size // (pp * tp), tp) for pp, tp in itertools.product(divisors, divisors)
              if size % (pp * tp) == 0]
    return min(shapes, key=distance)


def _create_group(name, ranks):
    """Create a group in MindSpore, where there are several ranks and no earlier mesh of this process has done it."""
    if len(ranks) > 1 and name not in _created:
        from mindspore.communication import create_group

        create_group(name, list(ranks))
        _created.add(name)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """This process's place among all, and its groups."""

    rank: int
    size: int
    coordinates: tuple  # (pp, dp, tp)
    tensor: Group
    data: Group
    pipeline: Group
    world: Group
    embedding: Group  # first and last stage; a group of one in a middle stage or without pipeline

    @staticmethod
    def single():
        """The mesh of one process; initialises no communication."""
        return Mesh.place(0, 1, 1, 1)

    @staticmethod
    def place(rank, pipeline, data, tensor):
        """The mesh as ``rank`` sees it: pure arithmetic, no communication."""
        size = pipeline * data * tensor
        groups = {}
        for kind, all_groups in groups_of(size, pipeline, data, tensor).items():
            ranks = next(ranks for ranks in all_groups if rank in ranks)
            name = group_name(ranks) if len(ranks) > 1 else None
            groups[kind] = Group(name, ranks, ranks.index(rank), len(ranks))
        coordinates = (rank // (data * tensor), rank // tensor % data, rank % tensor)
        return Mesh(rank, size, coordinates, **groups)

    @staticmethod
    def create(parallel):
        """The mesh that a `ParallelConfig` asks for, with communication initialised.

        To be called once, before anything else is done: msrun runs the script in one process more,
        its scheduler, which goes as far as this call and stays in it until the workers have ended.

        Raises:
            InputError: the mesh does not fit the number of processes (1 where msrun started none), or they have
                not all come; on one process, the others end.
        """
        size = process_count()
        if size == 1 and "MS_ROLE" not in os.environ:
            mesh_shape(parallel, size)
            return Mesh.single()
        import mindspore as ms
        from mindspore import communication

        from telechat.parallel.collective_errors import run_on_all
        from telechat.parallel.collectives import is_native

        if not communication.GlobalComm.INITED:
            if not is_native():
                # Else a collective on CPU gives up after MS_NODE_TIMEOUT seconds, while another rank may
                # compile or save for longer. When a rank dies, msrun ends the others all the same.
                os.environ.setdefault("MS_CPU_COMM_OP_TIMEOUT", "86400")
                ms.set_device("CPU")
            meet(communication)
        rank = communication.get_rank()
        world = Mesh.place(rank, 1, size, 1).world
        _create_group(world.name, world.ranks)
        mesh = Mesh.place(rank, *run_on_all(lambda: mesh_shape(parallel, size), world))
        return mesh.create_groups(separate_return=is_native())

    def create_groups(self, separate_return):
        """Create this rank's groups in MindSpore, in the same order of kinds on every rank.

        Where ``separate_return``, messages to lower pipeline stages get a group of their own. On Ascend
        all that a group does is queued on one stream, and a send holds the queue until its peer
        receives: two stages that send to each other before they receive, as in 1F1B, would both wait
        for ever.
        """
        for kind in KINDS:
            group = getattr(self, kind)
            _create_group(group.name, group.ranks)
        if not separate_return or self.pipeline.size == 1:
            return self
        pipeline = dataclasses.replace(self.pipeline, return_name=f"{self.pipeline.name}_return")
        _create_group(pipeline.return_name, pipeline.ranks)
        return dataclasses.replace(self, pipeline=pipeline)

    def describe(self):
        """For example "rank 5/8: pipeline 1/2, data 0/2, tensor 1/2"; places count from 0."""
        pp, dp, tp = self.coordinates
        return (f"rank {self.rank}/{self.size}: pipeline {pp}/{self.pipeline.size}, "
                f"data {dp}/{self.data.size}, tensor {tp}/{self.tensor.size}")
