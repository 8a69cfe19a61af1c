"""The names and shapes of a model's parameters, in our files and in the published ones.

Ours are the canonical names: those of the published 12B. The published 7B omits the prefix
``transformer.`` and has no head of its own; the published 52B has GPT-2's names, stores its
matrices as (in, out), and fuses more of them; TeleChat3 has Llama's names, and keys and values apart.
A canonical parameter is a slice of one published tensor or a few of them interleaved, so conversion in
either direction moves bits and computes nothing.
"""

import dataclasses
import functools
import re
from typing import Callable, Tuple

import numpy as np

_PREFIX = "transformer."

# In published or fine-tuned files, but constants of the code rather than weights.
_BUFFER = re.compile(r"\.(attn\.masked_bias|attn\.bias|rotary_emb\.inv_freq)$")

MASKED_BIAS = -10000.0  # of every attn.masked_bias of the published 52B


def parameter_shapes(config):
    """Canonical name → shape (tuple of int) of every parameter, in the model's order.

    A ``key_value`` weight is laid out head by head: the key rows of head 0, the value rows of
    head 0, the key rows of head 1, and so on.
    """
    hidden, inner = config.hidden_size, config.ffn_hidden_size
    heads, key_value = config.n_head * config.head_dim, 2 * config.num_key_value_heads * config.head_dim
    shapes = {"transformer.word_embeddings.weight": (config.vocab_size, hidden)}
    for layer in range(config.n_layer):
        block = {
            "input_layernorm.weight": (hidden,),
            "self_attention.query.weight": (heads, hidden),
            "self_attention.key_value.weight": (key_value, hidden),
            "self_attention.dense.weight": (hidden, heads),
            "self_attention.dense.bias": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "mlp.down_proj.bias": (hidden,),
        }
        for name, shape in block.items():
            if config.use_bias or not name.endswith(".bias"):
                shapes[f"transformer.h.{layer}.{name}"] = shape
    shapes["transformer.ln_f.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file in some layout, and the canonical parameters that it holds.

    Attributes:
        name: the tensor's name in the file.
        shape: its shape there.
        parameters: canonical names, in the order that `split` returns and `join` takes.
        split: array of `shape` → tuple of arrays, one a parameter (views where possible).
        join: the inverse of `split`, taking the arrays as arguments.
        partners: where several tensors make up the one parameter, their names in order, this one's among
            them; `split` then gives this tensor's share of it.
        combine: the shares of all partners, in order → the parameter.
    """

    name: str
    shape: Tuple[int, ...]
    parameters: Tuple[str, ...]
    split: Callable = lambda array: (array,)
    join: Callable = lambda array: array
    partners: Tuple[str, ...] = ()
    combine: Callable = None


def canonical_tensors(config):
    """Our own layout as a list of StoredTensor."""
    return [StoredTensor(name, shape, (name,)) for name, shape in parameter_shapes(config).items()]


def official_parameters(config):
    """The published layout of a model like `config`, as a list of StoredTensor in file order.

    Which layout it is follows from ``config.style`` and ``config.tie_word_embeddings``.
    """
    if config.style == "gpt2":
        return _gpt2_tensors(config)
    if config.style == "llama":
        return _llama_tensors(config)
    tensors = canonical_tensors(config)
    if config.tie_word_embeddings:
        tensors = [dataclasses.replace(tensor, name=tensor.name[len(_PREFIX):]) for tensor in tensors]
    return tensors


def _gpt2_tensors(config):
    hidden, inner = config.hidden_size, config.ffn_hidden_size
    heads = config.num_key_value_heads
    key = heads * config.head_dim

    def split_attention(array):
        query, keys, values = np.split(array.T, (hidden, hidden + key))
        return query, interleave_heads(keys, values, heads)

    def join_attention(query, key_value):
        return np.concatenate((query, *separate_heads(key_value, heads))).T

    def split_gate_up(array):
        return tuple(np.split(array.T, 2))

    def join_gate_up(gate, up):
        return np.concatenate((gate, up)).T

    def same(name, parameter):
        return StoredTensor(name, shapes[parameter], (parameter,))

    def transposed(name, parameter):
        return StoredTensor(name, shapes[parameter][::-1], (parameter,),
                            lambda array: (array.T,), lambda array: array.T)

    shapes = parameter_shapes(config)
    tensors = [same("transformer.wte.weight", "transformer.word_embeddings.weight")]
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}."
        attention, mlp = block + "self_attention.", block + "mlp."
        tensors += [
            same(block + "ln_1.weight", block + "input_layernorm.weight"),
            StoredTensor(block + "attn.c_attn.weight", (hidden, hidden + 2 * key),
                         (attention + "query.weight", attention + "key_value.weight"),
                         split_attention, join_attention),
            transposed(block + "attn.c_proj.weight", attention + "dense.weight"),
            same(block + "ln_2.weight", block + "post_attention_layernorm.weight"),
            StoredTensor(block + "mlp.c_fc.weight", (hidden, 2 * inner),
                         (mlp + "gate_proj.weight", mlp + "up_proj.weight"),
                         split_gate_up, join_gate_up),
            transposed(block + "mlp.c_proj.weight", mlp + "down_proj.weight"),
        ]
        if config.use_bias:
            tensors += [same(block + "attn.c_proj.bias", attention + "dense.bias"),
                        same(block + "mlp.c_proj.bias", mlp + "down_proj.bias")]
    return tensors + [same("transformer.ln_f.weight", "transformer.ln_f.weight"),
                      same("lm_head.weight", "lm_head.weight")]


def _llama_tensors(config):
    heads, key = config.num_key_value_heads, config.num_key_value_heads * config.head_dim
    shapes = parameter_shapes(config)

    def same(name, parameter):
        return StoredTensor(name, shapes[parameter], (parameter,))

    tensors = [same("model.embed_tokens.weight", "transformer.word_embeddings.weight")]
    for layer in range(config.n_layer):
        block, theirs = f"transformer.h.{layer}.", f"model.layers.{layer}."
        attention, their_attention = block + "self_attention.", theirs + "self_attn."
        key_value = tuple(their_attention + name for name in ("k_proj.weight", "v_proj.weight"))
        tensors += [
            same(their_attention + "q_proj.weight", attention + "query.weight"),
            *(StoredTensor(name, (key, config.hidden_size), (attention + "key_value.weight",),
                           join=functools.partial(_share, heads, index), partners=key_value,
                           combine=functools.partial(interleave_heads, heads=heads))
              for index, name in enumerate(key_value)),
            same(their_attention + "o_proj.weight", attention + "dense.weight"),
            *(same(f"{theirs}mlp.{name}.weight", f"{block}mlp.{name}.weight")
              for name in ("gate_proj", "up_proj", "down_proj")),
            *(same(f"{theirs}{name}.weight", f"{block}{name}.weight")
              for name in ("input_layernorm", "post_attention_layernorm")),
        ]
    tensors.append(same("model.norm.weight", "transformer.ln_f.weight"))
    return tensors if config.tie_word_embeddings else [*tensors, same("lm_head.weight", "lm_head.weight")]


def _share(heads, index, key_value):
    """Keys (index 0) or values (1) of a canonical key_value."""
    return separate_heads(key_value, heads)[index]


def interleave_heads(keys, values, heads):
    """(heads·D, H) keys and values → canonical key_value rows (2·heads·D, H): k0, v0, k1, v1, …"""
    width = keys.shape[1]
    pairs = np.stack((keys.reshape(heads, -1, width), values.reshape(heads, -1, width)), axis=1)
    return pairs.reshape(-1, width)


def separate_heads(key_value, heads):
    """The inverse of `interleave_heads`: (2·heads·D, H) → keys, values, each (heads·D, H)."""
    width = key_value.shape[1]
    pairs = key_value.reshape(heads, 2, -1, width)
    return pairs[:, 0].reshape(-1, width), pairs[:, 1].reshape(-1, width)


def official_tensors(config):
    """All that a published file of this layout holds: `official_parameters` and, in 52B, constants.

    A constant is a StoredTensor of no parameters, whose `join` returns it as float32. They come
    last, so that in a file they do not leave wider tensors behind them unaligned.
    """
    tensors = official_parameters(config)
    if config.style == "gpt2":
        tensors += [StoredTensor(f"transformer.h.{layer}.attn.masked_bias", (), (),
                                 lambda array: (), lambda: np.array(MASKED_BIAS, np.float32))
                    for layer in range(config.n_layer)]
    return tensors


def is_buffer(name):
    """Whether a tensor of this name in a published file is a constant of the code, not a weight."""
    return _BUFFER.search(name) is not None


def published_name(config):
    """Whose published layout it is, of any size: "telechat_7b", "telechat_12b", "telechat_52b", "telechat2", "telechat3".

    TeleChat2's is 12B's; its config.json tells the base of its NTK extension.
    """
    if config.style != "telechat":
        return {"gpt2": "telechat_52b", "llama": "telechat3"}[config.style]
    if "base_seqlen" in config.extra:
        return "telechat2"
    return "telechat_7b" if config.tie_word_embeddings else "telechat_12b"
