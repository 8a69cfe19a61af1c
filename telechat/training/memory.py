"""The memory that a run's training step is expected to take: telechat/parallel/estimate.py for a `RunConfig`."""

import dataclasses
import functools

from telechat.model import as_dtype
from telechat.nn import kernels
from telechat.parallel.estimate import FLOAT32, Workload, stage_memory
from telechat.parallel.mesh import mesh_shape
from telechat.parallel.parallel_config import process_count
from telechat.training.step import head_rows


def workload_of(model, run, sequence_length, on_cpu=False):
    """The `Workload` of a `RunConfig`'s step on a sequence length.

    on_cpu (bool): whether it runs on CPU, where activations are float32 whatever the weights are.
    """
    width = 2 if run.train.dtype == "bfloat16" else FLOAT32
    rows = functools.partial(head_rows, vocab_size=model.vocab_size)
    return Workload(sequence_length, run.batch_size, run.train.micro_batches, width,
                    FLOAT32 if on_cpu else width, rows, run.train.mask_padding, on_cpu)


def fullest_rank(model, run, sequence_length):
    """`Memory` of the run's process that needs most, on this device and with the processes there are.

    Args:
        model (TeleChatConfig): the architecture; it must fit the mesh.
        run (RunConfig): batch size, micro-batches, dtype, parallel settings.
        sequence_length (int): S.
    """
    parallel = dataclasses.replace(run.parallel, data=mesh_shape(run.parallel, process_count())[1])
    on_cpu = kernels.compute_dtype(as_dtype("bfloat16")) != as_dtype("bfloat16")
    workload = workload_of(model, run, sequence_length, on_cpu)
    memories = [stage_memory(model, parallel, workload, stage) for stage in range(parallel.pipeline)]
    return max(memories, key=lambda memory: memory.peak)
