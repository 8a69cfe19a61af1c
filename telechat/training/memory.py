"""How much memory a training step is expected to take, derived from the shapes."""

import dataclasses
import functools
import math

from telechat.checkpoint.layout import parameter_shapes
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


def expected_memory(model, run, sequence_length):
    """Bytes of a training step, and a sentence of what they consist of.

    Counted: weights, gradients, two float32 moments and, below float32, master weights; what the
    forward pass keeps of each layer (the inputs of its products); the attention scores of the
    layer at work; a chunk of logits with its gradient.

    Args:
        model (TeleChatConfig): the architecture.
        run (RunConfig): batch size, micro-batches, dtype.
        sequence_length (int): S.
    """
    count = sum(math.prod(shape) for shape in parameter_shapes(model).values())
    low = run.train.dtype != "float32"
    width = 2 if low else 4
    states = count * (width + width + 8 + (4 if low else 0))
    if run.train.micro_batches > 1:
        states += count * width
    rows = run.batch_size // run.train.micro_batches * sequence_length
    kept = 4 * model.hidden_size + 2 * model.num_key_value_heads * model.head_dim + 2 * model.ffn_hidden_size
    activations = rows * kept * model.n_layer * width
    scores = 3 * rows * sequence_length * model.n_head * 4
    logits = 3 * head_rows(rows, model.vocab_size) * model.vocab_size * 4
    total = states + activations + scores + logits
    return total, (f"weights and optimizer {states / 1e9:.2f}, activations {(activations + scores) / 1e9:.2f}, "
                   f"logits {logits / 1e9:.2f}")
