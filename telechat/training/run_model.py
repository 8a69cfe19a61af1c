"""The model that a run trains: what it is, and its weights, read or drawn."""

from telechat.adapters.peft import open_checkpoint
from telechat.checkpoint.layout import parameter_shapes
from telechat.config import TeleChatConfig
from telechat.errors import InputError
from telechat.model import TeleChat
from telechat.parallel.stage import build_stage, read_random


def read_model_config(config, source):
    """The `TeleChatConfig` of what a `RunConfig` trains.

    Args:
        config (RunConfig): the run.
        source (str): the checkpoint that the weights are read from; None for a model from scratch.

    Raises:
        InputError: no model is named, or it is described wrongly.
    """
    adapts = config.lora is not None or config.load_lora is not None
    if source is not None:
        return TeleChatConfig.from_pretrained(source, quantised=adapts)
    if adapts:
        raise InputError("lora adds an adapter to a model; give --load_checkpoint the model's directory")
    if config.model is None:
        raise InputError("load_checkpoint is not set; give --load_checkpoint a checkpoint directory, "
                         "or describe a model from scratch under the key model")
    return TeleChatConfig.from_dict(config.model)


def build_model(run):
    """The whole model of a `TrainingRun`, or this process's stage of it, read part by part."""
    source, config, train = run.source, run.model_config, run.config.train
    if run.mesh.world.size == 1:
        wanted = {"kernels": train.kernels, "use_flash_attention": train.use_flash_attention}
        if source:
            return TeleChat.from_pretrained(source, train.dtype, **wanted)
        return TeleChat(config, train.dtype, train.seed, **wanted)
    if source:
        reader, _ = open_checkpoint(source)
        reader.check(parameter_shapes(config))
        read = reader.read
    else:
        read = read_random(config, train.seed)
    return build_stage(config, train.dtype, run.mesh, run.config.parallel, read, train.kernels,
                       train.use_flash_attention)
