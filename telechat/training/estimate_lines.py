"""What tools/estimate.py says of a run, as lines: its mesh, memory, communication and speed."""

import dataclasses

from telechat.checkpoint.layout import parameter_shapes
from telechat.errors import InputError
from telechat.parallel.estimate import activation_bytes, elements
from telechat.parallel.estimate_peak import stage_memory
from telechat.parallel.estimate_speed import cards_of, predict, search, step_flops, traffic
from telechat.parallel.pipeline import bubble_fraction
from telechat.parallel.plan import stage_layers
from telechat.quantization.checkpoint import settings_of
from telechat.training.memory import memory_lines

_SHOWN = 20  # meshes that a search lists


def gigabytes(size):
    """Bytes in words, in a column."""
    return f"{size / 1e9:9.3f} GB"


def describe_run(model, config, workload):
    """The model, the mesh and the batch."""
    quantised = settings_of(model)
    parallel, count = config.parallel, elements(parameter_shapes(model).values())
    layers = ", ".join(str(len(layers)) for layers in stage_layers(model, parallel))
    on = [name for name in ("sequence_parallel", "shard_optimizer", "recompute") if getattr(parallel, name)]
    mesh = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline} (layers {layers})",
            f"data {parallel.data}"]
    tokens = config.batch_size * workload.sequence_length
    return [f"model       {count:,} parameters, {model.n_layer} layers of {model.hidden_size}, "
            f"{config.train.dtype}" + (f", products of {quantised['bits']} bits" if quantised else ""),
            f"mesh        {cards_of(parallel)} card(s): {', '.join(mesh + on)}",
            f"batch       {config.batch_size} sequences of {workload.sequence_length:,} = {tokens:,} tokens "
            f"a step, micro_batches {workload.micro_batches}"]


def describe_memory(model, parallel, workload, hardware):
    """The fullest rank's memory at its peak, and whether a card holds it."""
    stages = [stage_memory(model, parallel, workload, stage) for stage in range(parallel.pipeline)]
    peaks = [memory.peak for memory in stages]
    stage = peaks.index(max(peaks))
    memory = stages[stage]
    lines = ["", f"Memory of a rank in stage {stage}, the fullest: {memory.parameters:,} parameters, on "
                 f"{'a CPU' if workload.on_cpu else 'an Ascend card'}", *memory_lines(memory)]
    if parallel.pipeline > 1:
        lines.append("  peak of each stage: " + ", ".join(f"{peak / 1e9:.1f}" for peak in peaks) + " GB")
    lines.append("  activations with other settings:")
    for recompute in (False, True):
        for sequence in (False, True) if parallel.tensor > 1 else (False,):
            if sequence and workload.tokens(parallel) % parallel.tensor:
                continue
            other = dataclasses.replace(parallel, recompute=recompute, sequence_parallel=sequence)
            size = activation_bytes(model, other, workload, stage)
            lines.append(f"    {gigabytes(size)}  {'with' if recompute else 'without'} recompute, "
                         f"{'with' if sequence else 'without'} sequence_parallel")
    if workload.on_cpu:
        return [*lines, "  not counted: fragmentation, buffers of collectives"]
    if memory.peak <= hardware.card_memory:
        verdict = f"fits into {hardware.card_memory / 1e9:g} GB"
    else:
        verdict = f"DOES NOT FIT into {hardware.card_memory / 1e9:g} GB; try --search"
    return lines + [f"  {verdict}; not counted: what a card holds before a program begins, and the room that its operators "
                    "take to work in"]


def describe_traffic(model, parallel, workload):
    """What the busiest rank sends in a step."""
    stages = [traffic(model, parallel, workload, stage) for stage in range(parallel.pipeline)]
    sent = [sum(item.sent_bytes for item in items) for items in stages]
    stage = sent.index(max(sent))
    if not stages[stage]:
        return ["", "Communication: none, it is one card"]
    lines = ["", f"Communication of a rank in stage {stage} in a step",
             f"  {'purpose':34}{'operation':16}{'ranks':>12} {'calls':>8}  whole tensors   sent (ring)"]
    for item in stages[stage]:
        ranks = f"{item.group} {item.size}"
        lines.append(f"  {item.purpose:34}{item.operation:16}{ranks:>12} {item.calls:8,}   "
                     f"{gigabytes(item.tensor_bytes)}  {gigabytes(item.sent_bytes)}")
    return lines


def describe_speed(model, parallel, workload, hardware):
    """Work of a step, and on cards the speed that is predicted."""
    flops = f"FLOPs of a step  {step_flops(model, workload):.4g}, all cards together, nothing computed twice"
    if workload.on_cpu:
        return ["", flops]
    prediction = predict(model, parallel, workload, hardware)
    return ["",
            flops,
            f"bubble           {bubble_fraction(parallel.pipeline, workload.micro_batches):.1%}",
            f"predicted        {prediction.tokens_per_second:,.0f} tokens/s a card, {prediction.seconds:.2f} "
            f"s a step, of it {prediction.communicating:.1%} communication, {prediction.waiting:.1%} waiting "
            f"for other stages; {prediction.utilization:.1%} of the cards' FLOPs"]


def describe_search(model, cards, workload, hardware):
    """The meshes that fit, the fastest first; InputError where none does."""
    memory = f"{hardware.card_memory / 1e9:g} GB"
    fitting, others = search(model, cards, workload, hardware)
    if not fitting:
        least = f"; the least is {others[0].peak / 1e9:.1f} GB with {settings(others[0])}" if others else \
            f": none divides the model and batch_size {workload.batch_size}"
        raise InputError(f"no mesh of {cards} cards fits into {memory} a card{least}")
    lines = [f"{len(fitting)} mesh(es) of {cards} cards fit into {memory} a card, each with its fastest "
             "settings; predicted tokens/s a card, peak memory, bubble"]
    for candidate in fitting[:_SHOWN]:
        bubble = bubble_fraction(candidate.parallel.pipeline, candidate.micro_batches)
        lines.append(f"{candidate.prediction.tokens_per_second:8,.0f}  {candidate.peak / 1e9:6.1f} GB  "
                     f"{bubble:6.1%}  {settings(candidate)}")
    if others:
        lines.append(f"{len(others)} more do not fit, the smallest with {others[0].peak / 1e9:.1f} GB")
    return lines


def settings(candidate):
    """As they are given on the command line."""
    parallel = candidate.parallel
    values = [f"parallel.{name}={getattr(parallel, name)}" for name in ("tensor", "pipeline", "data")]
    values.append(f"micro_batches={candidate.micro_batches}")
    values += [f"parallel.{name}={str(getattr(parallel, name)).lower()}"
               for name in ("sequence_parallel", "shard_optimizer", "recompute")]
    return " ".join(values)
