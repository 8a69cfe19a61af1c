"""Whether a run fits into main memory and onto the disk, told before its weights are read."""

import math
import os

from telechat.adapters.modules import lora_shapes
from telechat.checkpoint.layout import parameter_shapes
from telechat.memory_check import available_bytes, check_disk, check_memory
from telechat.nn import kernels
from telechat.parallel.estimate import FLOAT32
from telechat.parallel.rendezvous import local_process_count
from telechat.training.memory import stage_memories
from telechat.training.training_state import list_checkpoints


def check_resources(run):
    """Raise InputError where the steps or the checkpoints of a `TrainingRun` do not fit on this machine.

    A card's memory shows only when it is taken; the disk is looked at wherever a run is.
    """
    config, model = run.config, run.model_config
    if kernels.on_cpu():
        memories = stage_memories(model, config, run.dataset.max_length)
        share = local_process_count() / len(memories)
        parts = {name: int(share * sum(memory.parts[name] for memory in memories)) for name in memories[0].parts}
        check_memory(parts, "training", _advice(config), available_bytes(), run.ignore_memory)
    count, size = checkpoints_at_once(config), checkpoint_bytes(model, config.train.dtype, run.lora)
    there = sum(map(directory_bytes, list_checkpoints(config.output_dir)))
    check_disk(config.output_dir, count * size - there,
               f"{count} checkpoint{'s' * (count > 1)} of {size / 1e9:,.2f} GB" +
               (", the newest before the oldest goes," if count > config.keep_checkpoints else ""),
               "lower keep_checkpoints, give another output_dir", run.ignore_memory)


def checkpoint_bytes(model, dtype, lora=None):
    """Bytes of a training checkpoint: weights, two moments and, where they are copies, master weights.

    Of an adapter (``lora``, a `LoraConfig`): its tensors twice, as peft reads them and cut as the mesh has them, and two
    moments.
    """
    if lora is not None:
        return 4 * FLOAT32 * sum(map(math.prod, lora_shapes(model, lora).values()))
    count = sum(map(math.prod, parameter_shapes(model).values()))
    return count * (3 * FLOAT32 if dtype == "float32" else 2 + 3 * FLOAT32)


def checkpoints_at_once(config):
    """How many checkpoints of a `RunConfig` are there at its fullest: one more than stay, if so many are made."""
    steps = config.train.total_steps
    made = math.ceil(steps / config.save_steps) if config.save_steps else 1
    return min(config.keep_checkpoints + 1, made)


def directory_bytes(path):
    """Bytes of all files below a directory; of what goes meanwhile nothing."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except OSError:
                pass
    return total


def _advice(config):
    """What makes a run smaller that this one does not do yet."""
    ways = []
    if config.batch_size > config.train.micro_batches * (config.parallel.data or 1):
        ways.append("raise micro_batches or lower batch_size")
    if not config.parallel.recompute:
        ways.append("set parallel.recompute=true")
    return " and ".join([*ways, "preprocess with a smaller --max_length"])
