"""The memory of one rank in a training step: what is there at its fullest moment."""

import dataclasses

from telechat.parallel.estimate import FLOAT32, optimizer_bytes, weight_bytes
from telechat.parallel.estimate_card import CardStep
from telechat.parallel.estimate_cpu import CpuStep


@dataclasses.dataclass(frozen=True)
class Memory:
    """One rank's memory.

    ``parts`` is what is there at the peak and adds up to it. The fields before it are each at its own largest, so
    that their sum is more: not everything is there at the same time.
    """

    parameters: int  # a number, the rows that fill up the vocabulary included
    weights: int
    gradients: int
    optimizer: int  # moments and, where they are copies, float32 master weights
    activations: int  # kept between forward and backward passes, all micro-batches under way together
    logits: int  # a chunk of them, and the head's gradients that are at work with it
    held: int  # what compiled graphs hold on to of their last call
    work: int  # of a block's graphs, the update or the reduction of gradients: the largest of them
    peak: int
    peak_phase: str  # "forward", "head", "backward", "reduce gradients" or "update"
    parts: dict  # name → bytes


def stage_memory(model, parallel, workload, stage):
    """`Memory` of a rank in pipeline stage ``stage``.

    Not counted: on a CPU fragmentation and the buffers of collectives; on a card what is there before a program begins,
    and the room that CANN's operators take to work in.

    Args:
        model (TeleChatConfig): the whole model.
        parallel (ParallelConfig): with ``data`` filled in; must have passed `check_mesh`.
        workload (Workload): the step.
        stage (int): 0 to pipeline − 1.
    """
    step = (CpuStep if workload.on_cpu else CardStep)(model, parallel, workload, stage)
    frozen = workload.adapter is not None
    weights = weight_bytes(step.parts, workload) + (step.trained.parameters * FLOAT32 if frozen else 0)
    optimizer = optimizer_bytes(step.trained, parallel, FLOAT32 if frozen else workload.weight_bytes)
    phase, (activations, gradients, work) = max(
        ((name, moment) for name, moments in step.phases().items() for moment in moments), key=lambda item: sum(item[1]))
    held = step.held()
    parts = {"weights": weights, "optimizer": optimizer, "gradients": gradients, "activations": activations, "work": work,
             "held": held, "tables": step.tables(), **step.others(gradients + activations + work + held)}
    return Memory(step.parts.parameters, weights, step.gradients, optimizer, step.kept, step.head_work(), held,
                  max(step.backward_work(), step.update_work(), step.reduced), sum(parts.values()), phase, parts)
