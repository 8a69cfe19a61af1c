"""ParallelConfig: how a model and its data are spread over processes."""

import dataclasses
import os

from telechat import fields
from telechat.errors import InputError


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """The mesh of a run and what is done on it, as the YAML's ``parallel:`` gives it.

    Raises:
        InputError: a value is of the wrong type or out of range.
    """

    tensor: int = 1  # ranks that share every layer (tensor parallel)
    pipeline: int = 1  # stages of consecutive layers
    data: int = None  # copies of the model; None: what is left of the processes
    sequence_parallel: bool = False  # norm and residual regions are cut along the rows too
    shard_optimizer: bool = False  # moments and master weights are cut over the data-parallel ranks
    recompute: bool = False  # keep each block's input only, compute it again in the backward pass
    stages: tuple = None  # layers of each pipeline stage; None: balanced by cost

    def __post_init__(self):
        for name in ("tensor", "pipeline", "data"):
            default = {"default": None} if name == "data" else {}
            count = fields.whole_number(f"parallel.{name}", getattr(self, name), 1, 2 ** 31 - 1, **default)
            object.__setattr__(self, name, count)
        for name in ("sequence_parallel", "shard_optimizer", "recompute"):
            fields.flag(f"parallel.{name}", getattr(self, name))
        if self.stages is not None:
            stages = self.stages
            if not isinstance(stages, (list, tuple)):
                raise InputError(f"parallel.stages must list the layers of each stage, not {fields.shown(stages)}")
            stages = [fields.whole_number("each of parallel.stages", count, 1, 2 ** 31 - 1) for count in stages]
            object.__setattr__(self, "stages", tuple(stages))
            if len(stages) != self.pipeline:
                raise InputError(f"parallel.stages lists {len(stages)} stages, parallel.pipeline is {self.pipeline}; "
                                 "make them agree")
        if self.sequence_parallel and self.tensor == 1:
            object.__setattr__(self, "sequence_parallel", False)  # nothing to cut over


def process_count():
    """How many processes the run has: what msrun says, 1 without it."""
    return int(os.environ.get("MS_WORKER_NUM") or os.environ.get("RANK_SIZE") or 1)
