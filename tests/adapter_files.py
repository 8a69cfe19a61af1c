"""Adapters made here, as the peft package saves them, for each of the published layouts."""

import json

import numpy as np
from safetensors.numpy import save_file

from telechat.checkpoint import layout

PRODUCTS = {"telechat": ("self_attention.query", "self_attention.key_value", "self_attention.dense", "mlp.gate_proj",
                         "mlp.up_proj", "mlp.down_proj"),
            "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
            "llama": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                      "mlp.up_proj", "mlp.down_proj")}


def write_adapter(folder, config, rank, targets=None, seed=0, layers=None, size=0.1, **settings):
    """Save an adapter with random factors for some modules of a model, by default all, of some layers, by default all."""
    targets, own = targets or PRODUCTS[config.style], settings.get("rank_pattern", {})
    random = np.random.default_rng(seed)
    tensors = {}
    for tensor in layout.official_parameters(config):
        module = tensor.name.removesuffix(".weight")
        layer = module.split(".")
        number = next((int(part) for part in layer if part.isdigit()), None)
        if not tensor.name.endswith(".weight") or not module.endswith(tuple(targets)) or (layers and number not in layers):
            continue
        outputs, inputs = tensor.shape[::-1] if config.style == "gpt2" else tensor.shape
        of_module = next((value for key, value in own.items() if module.endswith(key)), rank)
        full = module if module.startswith(("transformer.", "model.", "lm_head")) else f"transformer.{module}"
        for part, shape in (("A", (of_module, inputs)), ("B", (outputs, of_module))):
            tensors[f"base_model.model.{full}.lora_{part}.weight"] = size * random.standard_normal(shape).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets)} | settings))
    return folder
