"""The memory that a run is expected to take: telechat/parallel/estimate_peak.py for a `RunConfig`, and in words."""

import dataclasses
import functools

from telechat.adapters.modules import lora_shapes
from telechat.model import as_dtype
from telechat.nn import kernel_choice, kernels
from telechat.nn.blockwise_attention import SCORES, is_long
from telechat.nn.cpu.build import ATTENTION_BLOCK as BLOCK
from telechat.nn.flash_attention import obstacle as flash_obstacle
from telechat.parallel.estimate import FLOAT32, Workload
from telechat.parallel.estimate_peak import stage_memory
from telechat.parallel.mesh import mesh_shape
from telechat.parallel.parallel_config import process_count
from telechat.quantization.checkpoint import product_bytes, settings_of
from telechat.training.lora_run import resolve_lora
from telechat.training.step import head_rows

# What each part of a `Memory` is.
MEANINGS = {
    "weights": "",
    "optimizer": "moments and float32 master weights",
    "gradients": "",
    "activations": "kept for the backward pass",
    "work": "of what runs then: {phase}",
    "held": "what compiled graphs keep of their last call",
    "tables": "masks and positions",
    "framework": "MindSpore and its compiler",
    "pool": "what MindSpore's pool holds beside tensors, 15 % of those that come and go",
    "hccl": "buffers of its groups, twice HCCL_BUFFSIZE (200 MB) each",
}


def workload_of(model, run, sequence_length, on_cpu=False):
    """The `Workload` of a `RunConfig`'s step on a sequence length.

    on_cpu (bool): whether it runs on CPU, where activations are float32 whatever the weights are.
    """
    width = FLOAT32 if run.train.dtype == "float32" else 2
    logits = kernels.LOGITS_ON_CPU if on_cpu else kernels.LOGITS_ON_CARD
    rows = functools.partial(head_rows, vocab_size=model.vocab_size, logits=logits)
    own = on_cpu and run.train.kernels != "portable" and kernel_choice.cpu_obstacle(as_dtype(run.train.dtype)) is None
    if own:
        scores = BLOCK ** 2  # of the operators' attention
    else:
        scores = SCORES if on_cpu and is_long(sequence_length) else None
    adapter, dropped = None, 0
    lora = resolve_lora(run, model)
    if lora is not None:
        adapter = {name: shape for name, shape in lora_shapes(model, lora).items() if ".h.0." in name}
        dropped = sum(shape[1] for name, shape in adapter.items() if ".lora_A." in name) if lora.dropout else 0
    flash = not on_cpu and run.train.kernels != "portable" and run.train.use_flash_attention is not False \
        and flash_obstacle(as_dtype(run.train.dtype), model.head_dim) is None
    quantised = settings_of(model)
    products = None if quantised is None else functools.partial(product_bytes, settings=quantised)
    return Workload(sequence_length, run.batch_size, run.train.micro_batches, width,
                    FLOAT32 if on_cpu else width, rows, run.train.mask_padding, scores,
                    kernels.ROWS_AT_ONCE if on_cpu else None, on_cpu, own, adapter, dropped, flash, products)


def stage_memories(model, run, sequence_length):
    """`Memory` of a rank in each of the run's pipeline stages, on this device and with the processes there are.

    Args:
        model (TeleChatConfig): the architecture; it must fit the mesh.
        run (RunConfig): batch size, micro-batches, dtype, parallel settings.
        sequence_length (int): S.
    """
    parallel = dataclasses.replace(run.parallel, data=mesh_shape(run.parallel, process_count())[1])
    workload = workload_of(model, run, sequence_length, kernels.on_cpu())
    return [stage_memory(model, parallel, workload, stage) for stage in range(parallel.pipeline)]


def fullest_rank(model, run, sequence_length):
    """`Memory` of the run's process that needs most; arguments as of `stage_memories`."""
    return max(stage_memories(model, run, sequence_length), key=lambda memory: memory.peak)


def memory_lines(memory, whose=""):
    """A `Memory` as printable lines: the peak, and what is there then, which adds up to it.

    whose (str): what it is the memory of, e.g. " of the fullest process".
    """
    shown = {name: round(size / 1e9, 2) for name, size in memory.parts.items() if size >= 5e6}
    # To the last digit: what rounding adds or loses goes to the largest part.
    largest = max(memory.parts, key=memory.parts.get)
    shown[largest] = round(memory.peak / 1e9, 2) - sum(size for name, size in shown.items() if name != largest)
    lines = [f"memory      about {memory.peak / 1e9:.2f} GB expected at the peak{whose}:"]
    return lines + [f"            {size:8.2f} GB  {name:12}{MEANINGS[name].format(phase=memory.peak_phase)}".rstrip()
                    for name, size in shown.items()]
