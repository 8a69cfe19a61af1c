"""An adapter's directory, in and out of training: what it was trained with, and how it is written for the peft package."""

import json
import os

import numpy as np
from safetensors.numpy import save_file

from telechat import fields
from telechat.adapters.lora_config import LoraConfig
from telechat.adapters.modules import join_b, layer_prefix, lora_names, modules_of, products_of
from telechat.adapters.peft import CONFIG, PREFIX, WEIGHTS
from telechat.checkpoint.safetensors_files import SafetensorsFiles
from telechat.errors import InputError
from telechat.text_files import read_json_object


def lora_of(adapter, config, dropout=None):
    """The `LoraConfig` of an `Adapter` that is to be trained further, with ``dropout``; None: with its own.

    Raises:
        InputError: its layers differ in what they change, or in rank or alpha; its own dropout is no rate.
    """
    settings, official = adapter.settings, adapter.modules
    if adapter.trained_whole:
        raise InputError(f"{adapter.directory} holds {min(adapter.trained_whole)} as a whole, which cannot be trained on; start a "
                         "new adapter on the merged model (tools/convert.py merge-lora)")
    ranks_and_alphas = {(adapter.rank_of(module), adapter.alpha_of(module)) for module in official}
    if len(ranks_and_alphas) > 1:
        raise InputError(f"{adapter.directory} has a rank or alpha of its own for some modules, which cannot be trained on; "
                         "start a new adapter on the merged model (tools/convert.py merge-lora)")
    known = modules_of(config)
    changed = {f"{layer_prefix(config, layer)}{module.name}": (layer, module)
               for layer in range(config.n_layer) for module in known}
    strange = [name for name in official if name not in changed]
    modules = [module for module in known if any(changed[name][1] == module for name in official if name in changed)]
    if strange or len(official) != len(modules) * config.n_layer:
        what = f"changes {strange[0]}" if strange else "does not change the same modules in every layer"
        raise InputError(f"{adapter.directory} {what}, which cannot be trained on; start a new adapter on the merged model "
                         "(tools/convert.py merge-lora)")
    (rank, alpha), = ranks_and_alphas
    if dropout is None:
        dropout = fields.real_number(f"{os.path.join(adapter.directory, CONFIG)}: lora_dropout", settings["lora_dropout"],
                                     least=0, below=1, default=0.0)
    return LoraConfig(rank, alpha, dropout, tuple(products_of(modules)), settings["use_rslora"])


def check_adapter_files(directory):
    """InputError unless an adapter's files are there and can be read, as far as that shows without a model."""
    read_json_object(os.path.join(directory, CONFIG), "copy the adapter again")
    if not os.path.isfile(os.path.join(directory, WEIGHTS)):
        raise InputError(f"{directory} holds no {WEIGHTS}; copy the adapter again")
    SafetensorsFiles(directory, [WEIGHTS])


def write_adapter(directory, config, lora, read, base=None):
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as peft does.

    Args:
        directory (str): exists.
        config (TeleChatConfig): of the model.
        lora (LoraConfig): the adapter.
        read (callable): ``read(name)`` → float32 array, a whole tensor of `lora_shapes`.
        base (str): where the model is, for people to read.
    """
    modules = modules_of(config, lora.targets)
    tensors = {}
    for layer in range(config.n_layer):
        for module in modules:
            a, bs = lora_names(layer, module)
            name = f"{PREFIX}{layer_prefix(config, layer)}{module.name}"
            tensors[f"{name}.lora_A.weight"] = read(a)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(join_b(config, module, [read(b) for b in bs]))
    save_file(tensors, os.path.join(directory, WEIGHTS), metadata={"format": "pt"})
    alpha = int(lora.alpha) if lora.alpha.is_integer() else lora.alpha
    values = {"base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": config.style == "gpt2",
              "inference_mode": True, "init_lora_weights": True, "lora_alpha": alpha, "lora_dropout": lora.dropout,
              "peft_type": "LORA", "r": lora.rank, "target_modules": [module.target for module in modules],
              "task_type": "CAUSAL_LM", "use_rslora": lora.rslora}
    with open(os.path.join(directory, CONFIG), "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
