"""What a run is about to do, for people to read before its first step."""

import math

from telechat.adapters.modules import lora_shapes
from telechat.checkpoint.layout import parameter_shapes
from telechat.parallel.pipeline import bubble_fraction
from telechat.parallel.plan import stage_layers
from telechat.training.memory import fullest_rank, memory_lines
from telechat.training.resources import checkpoint_bytes, checkpoints_at_once


def describe_run(run):
    """The resolved `TrainingRun` as printable lines."""
    config, model, dataset = run.config, run.model_config, run.dataset
    train = config.train
    count = sum(math.prod(shape) for shape in parameter_shapes(model).values())
    tokens = config.batch_size * dataset.max_length
    memory = fullest_rank(model, config, dataset.max_length)
    whose = "" if run.mesh.world.size == 1 else " of the fullest process"
    source = run.source or "random weights"
    return [
        f"model       {count / 1e6:,.1f}M parameters, {model.n_layer} layers of {model.hidden_size}, from {source}",
        *_describe_adapter(run),
        f"data        {config.train_dataset}: {dataset.num_packs:,} packs of {dataset.max_length} tokens",
        f"batch       {config.batch_size} sequences = {tokens:,} tokens a step, micro_batches {train.micro_batches}",
        f"steps       {train.total_steps:,} ({_epochs(train.total_steps * config.batch_size, dataset.num_packs)}), "
        f"warm-up {train.resolved_warmup_steps}",
        f"optimizer   AdamW, lr {train.learning_rate:g} {train.lr_schedule}, {train.dtype}, "
        f"clip {train.max_grad_norm:g}",
        f"kernels     {run.kernels.describe()}",
        *memory_lines(memory, whose),
        f"output      {config.output_dir}: {checkpoint_bytes(model, train.dtype, run.lora) / 1e9:.2f} GB a checkpoint, up to "
        f"{checkpoints_at_once(config)} at once",
        *_describe_mesh(run.mesh, config.parallel, model, train.micro_batches)]


def _describe_adapter(run):
    lora = run.lora
    if lora is None:
        return []
    count = sum(math.prod(shape) for shape in lora_shapes(run.model_config, lora).values())
    source = run.checkpoint or run.config.load_lora
    return [f"adapter     {count / 1e6:,.2f}M parameters: rank {lora.rank}, alpha {lora.alpha:g}"
            f"{' / √rank' if lora.rslora else ''}, dropout {lora.dropout:g}; the model's stay",
            f"            of {', '.join(lora.targets)}", *([f"            from {source}"] if source else [])]


def _epochs(sequences, packs):
    """What share of the data is seen: "2.5 epochs", "4 of 700 packs" where that is less than a tenth of one."""
    if 10 * sequences < packs:
        return f"{sequences:,} of {packs:,} packs, less than an epoch"
    return f"{sequences / packs:.1f} epochs"


def _describe_mesh(mesh, parallel, model, micro_batches):
    if mesh.world.size == 1:
        return []
    stages = ", ".join(str(len(layers)) for layers in stage_layers(model, parallel))
    on = [name for name in ("sequence_parallel", "shard_optimizer", "recompute") if getattr(parallel, name)]
    bubble = bubble_fraction(mesh.pipeline.size, micro_batches)
    return [f"mesh        {mesh.world.size} processes: tensor {mesh.tensor.size}, pipeline {mesh.pipeline.size} "
            f"(layers {stages}), data {mesh.data.size}{''.join(', ' + name for name in on)}; bubble {bubble:.1%}"]
