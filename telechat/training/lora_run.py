"""What a run that trains an adapter has in the place of one that trains weights."""

import dataclasses
import os

from telechat.adapters.directory import lora_of
from telechat.adapters.modules import modules_of, products_of
from telechat.adapters.peft import CONFIG, Adapter
from telechat.adapters.trained import TrainedAdapter, read_adapter, read_initial
from telechat.errors import InputError


def resolve_lora(config, model_config):
    """The `LoraConfig` of a `RunConfig`, its own or its ``load_lora``'s; None where all weights are trained.

    Raises:
        InputError: it does not fit the model or the configuration.
    """
    lora = config.lora
    if lora is None and config.load_lora is None:
        return None
    if config.load_lora is not None:
        saved = lora_of(Adapter(config.load_lora, model_config), model_config, None if lora is None else lora.dropout)
        if lora is None:
            return saved
        lora = dataclasses.replace(lora, targets=tuple(products_of(modules_of(model_config, lora.targets))))
        for field in dataclasses.fields(saved):
            there, here = getattr(saved, field.name), getattr(lora, field.name)
            if there != here:
                raise InputError(f"lora.{field.name} is {_shown(here)} and {config.load_lora} has {_shown(there)}; "
                                 "to train it further leave lora out, or but for dropout as it is there")
        return saved
    modules_of(model_config, lora.targets)
    return lora


def _shown(value):
    return ", ".join(value) if isinstance(value, tuple) else value


def check_kind(checkpoint, lora):
    """Refuse to go on from a checkpoint of an adapter without one, and the other way round."""
    if checkpoint is None:
        return
    is_adapter = os.path.isfile(os.path.join(checkpoint, CONFIG))
    if is_adapter and lora is None:
        raise InputError(f"{checkpoint} is of a run that trains an adapter; go on with the same lora in the configuration")
    if not is_adapter and lora is not None:
        raise InputError(f"{checkpoint} is of a run that trains all weights; leave lora out, or give another output_dir")


def build_adapter(run, layers):
    """The `TrainedAdapter` of a `TrainingRun` for the layers held here; None where all weights are trained."""
    if run.lora is None:
        return None
    config, source = run.model_config, run.config.load_lora
    if source is not None and run.checkpoint is None:
        read = read_adapter(Adapter(source, config), config, run.lora)
    else:
        read = read_initial(config, run.lora, run.config.train.seed)  # a checkpoint's values are read later
    return TrainedAdapter(config, run.lora, layers, read, run.mesh.tensor)
