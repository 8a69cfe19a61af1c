"""Which modules of the official torch models an adapter may change, and what they are in our blocks.

Our products are those of the published 12B. 52B has one module for queries, keys and values and one for gate and up, so
one A for several of our products; TeleChat3 has keys and values apart.
"""

import dataclasses

import numpy as np

from telechat.checkpoint.layout import interleave_heads, parameter_shapes, separate_heads
from telechat.errors import InputError
from telechat.nn.lora import ATTENTION, PRODUCTS


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear module of an official layer.

    Attributes:
        name: below the layer, for example "self_attention.query".
        products: ours that it makes (`telechat.nn.lora.PRODUCTS`), in the order of its outputs.
    """

    name: str
    products: tuple

    @property
    def target(self):
        """What peft's target_modules call it: its last name, where this is no other module's."""
        last = self.name.rpartition(".")[2]
        return self.name if last == "c_proj" else last


_TELECHAT = [Module(f"self_attention.{name}", (name,)) for name in ("query", "key_value", "dense")] + [
    Module(f"mlp.{name}", (name,)) for name in ("gate_proj", "up_proj", "down_proj")]
_GPT2 = [Module("attn.c_attn", ("query", "key_value")), Module("attn.c_proj", ("dense",)),
         Module("mlp.c_fc", ("gate_proj", "up_proj")), Module("mlp.c_proj", ("down_proj",))]
_LLAMA = [Module("self_attn.q_proj", ("query",)), Module("self_attn.k_proj", ("key",)),
          Module("self_attn.v_proj", ("value",)), Module("self_attn.o_proj", ("dense",))] + _TELECHAT[3:]
_LAYERS = {"telechat": "transformer.h.", "gpt2": "transformer.h.", "llama": "model.layers."}


def layer_prefix(config, layer):
    """What stands before a `Module`'s name in a layer of the official torch model."""
    return f"{_LAYERS[config.style]}{layer}."


def modules_of(config, targets=None):
    """The `Module`s of each layer of a model that make the products ``targets``, in order; None: all.

    Raises:
        InputError: some, but not all of a module's products are among them.
    """
    modules = {"telechat": _TELECHAT, "gpt2": _GPT2, "llama": _LLAMA}[config.style]
    if targets is None:
        return modules
    products = {product for module in modules for product in module.products}
    wanted = set(targets) & products
    if "key_value" in targets and "key_value" not in products:
        wanted |= {"key", "value"}
    strange = [target for target in targets if target not in products and target != "key_value"]
    if strange:
        raise InputError(f"lora.targets holds {strange[0]}, which is no module of this model; its keys and values are one: "
                         "name key_value")
    chosen = [module for module in modules if wanted & set(module.products)]
    for module in chosen:
        if not set(module.products) <= wanted:
            names = " and ".join(module.products)
            raise InputError(f"lora.targets holds only a part of {names}, which are one module ({module.name}) of this model; "
                             "name both or none")
    return chosen


def product_shape(config, product):
    """(outputs, inputs) of one of our products."""
    shapes = parameter_shapes(config)
    if product in ("key", "value"):
        outputs, inputs = shapes["transformer.h.0.self_attention.key_value.weight"]
        return outputs // 2, inputs
    return shapes[parameter_name(0, product) + ".weight"]


def parameter_name(layer, product):
    """The canonical name of a product, without ``.weight``."""
    return f"transformer.h.{layer}.{'self_attention' if product in ATTENTION else 'mlp'}.{product}"


def lora_names(layer, module):
    """The canonical names of a module's A, which its first product's is called by, and of each product's B."""
    names = [parameter_name(layer, product) for product in module.products]
    return f"{names[0]}.lora_A.weight", [f"{name}.lora_B.weight" for name in names]


def lora_shapes(config, lora):
    """Canonical name → shape of every tensor of the adapter that a `LoraConfig` describes, in the model's order."""
    shapes = {}
    for layer in range(config.n_layer):
        for module in modules_of(config, lora.targets):
            a, bs = lora_names(layer, module)
            shapes[a] = (lora.rank, product_shape(config, module.products[0])[1])
            shapes.update({b: (product_shape(config, product)[0], lora.rank) for b, product in zip(bs, module.products)})
    return shapes


def products_of(modules):
    """All products that some `Module`s make, in the order of `PRODUCTS`."""
    made = {product for module in modules for product in module.products}
    return [product for product in PRODUCTS if product in made]


def split_b(config, module, b):
    """A module's B (all its outputs, rank) → each product's, keys and values head by head."""
    if module.products == ("query", "key_value"):
        heads = config.num_key_value_heads
        query, key = config.n_head * config.head_dim, heads * config.head_dim
        return [b[:query], interleave_heads(b[query:query + key], b[query + key:], heads)]
    return np.split(b, len(module.products))


def join_b(config, module, parts):
    """The inverse of `split_b`."""
    if module.products == ("query", "key_value"):
        return np.concatenate((parts[0], *separate_heads(parts[1], config.num_key_value_heads)))
    return np.concatenate(parts)
