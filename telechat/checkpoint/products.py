"""The products of a block by the canonical names of their weights."""

# Below ``transformer.h.N.``, in the order of the computation.
PRODUCTS = ("self_attention.query", "self_attention.key_value", "self_attention.dense", "mlp.gate_proj", "mlp.up_proj",
            "mlp.down_proj")


def product_weight(layer, product):
    """The canonical name of the weight of one of `PRODUCTS`."""
    return f"transformer.h.{layer}.{product}.weight"


def is_product(name):
    """Whether the parameter of a canonical name is the weight of a block's product."""
    return name.startswith("transformer.h.") and name.split(".", 3)[3].removesuffix(".weight") in PRODUCTS
