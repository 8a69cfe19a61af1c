"""The layout of the .ckpt files that MindFormers' TeleChat converter and training write.

Facts from MindFormers, research/telechat: ``w1`` is the gate, ``w3`` the up and ``w2`` the down
projection; ``wk_v`` keeps the published order, head by head. In 52B files the query, key and value
rows and the gate and up rows are fused for one number N of cards (the converter's ``--mp``): card
by card, and within a card first query, then key, then value; first gate, then up. (Its converter
has a second order of w_qkv, for ``--mp 1`` only: query, key and value head by head. MindFormers'
own model reads such a file wrongly, and it is not read here.)
"""

import os
import re

import numpy as np

from telechat.checkpoint.layout import StoredTensor, interleave_heads, parameter_shapes
from telechat.errors import InputError
from telechat.text_files import refuse_placeholder_file

_NAMES = {
    "transformer.word_embeddings.weight": "model.tok_embeddings.embedding_weight",
    "transformer.ln_f.weight": "model.norm_out.weight",
    "lm_head.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attention.query.weight": "attention.wq.weight",
    "self_attention.key_value.weight": "attention.wk_v.weight",
    "self_attention.dense.weight": "attention.wo.weight",
    "self_attention.dense.bias": "attention.wo.bias",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.down_proj.bias": "feed_forward.w2.bias",
}
# In 52B files, the first two together are attention.w_qkv, the last two feed_forward.w_gate_hidden.
_FUSED = ("self_attention.query.weight", "self_attention.key_value.weight",
          "mlp.gate_proj.weight", "mlp.up_proj.weight")
# What training and inference of MindFormers save beside the weights.
_STATE = re.compile(
    r"(adam_[mv]|moment[12]|moments|exp_avg|exp_avg_sq|accu_grads)\..+"
    r"|.+\.(key_cache|value_cache|key_past|value_past)"
    r"|global_step|epoch_num|step_num|learning_rate|loss_scale|scale_sense|beta[12]_power"
    r"|current_iterator_step|last_overflow_iterator_step|list_index|scale_window_(up|down)_count"
    r"|_device_local_loss|graceful_(exit|init)")


def mindformers_tensors(config, mp):
    """The tensors of a MindFormers file of a model like `config`, as a list of StoredTensor (`split` only).

    Args:
        mp: number of cards N that a 52B file was made for; without effect on the other layouts.

    Raises:
        InputError: the heads or the MLP's width do not divide by `mp`.
    """
    shapes = parameter_shapes(config)
    fused = config.style == "gpt2"
    if isinstance(mp, bool) or not isinstance(mp, int) or mp < 1:
        raise InputError(f"mp must be a positive whole number, not {mp!r}")
    for field in ("n_head", "num_key_value_heads", "ffn_hidden_size") if fused else ():
        if getattr(config, field) % mp:
            raise InputError(f"mp {mp} does not divide {field} {getattr(config, field)}; "
                             "give the mp that the file was converted or trained with")
    tensors = [StoredTensor(theirs, shapes[name], (name,))
               for name, theirs in _NAMES.items() if name in shapes]
    for layer in range(config.n_layer):
        block, their_block = f"transformer.h.{layer}.", f"model.layers.{layer}."
        tensors += [StoredTensor(their_block + theirs, shapes[block + name], (block + name,))
                    for name, theirs in _BLOCK_NAMES.items()
                    if block + name in shapes and not (fused and name in _FUSED)]
        if fused:
            tensors += _fused_tensors(config, mp, block, their_block)
    return tensors


def _fused_tensors(config, mp, block, their_block):
    hidden, inner, size = config.hidden_size, config.ffn_hidden_size, config.head_dim
    heads, key_heads = config.n_head // mp, config.num_key_value_heads // mp  # of one card

    def split_attention(array):
        cards = array.reshape(mp, heads + 2 * key_heads, size, hidden)
        query, keys, values = (part.reshape(-1, hidden)
                               for part in np.split(cards, (heads, heads + key_heads), axis=1))
        return query, interleave_heads(keys, values, config.num_key_value_heads)

    def split_gate_up(array):
        cards = array.reshape(mp, 2, inner // mp, hidden)
        return cards[:, 0].reshape(-1, hidden), cards[:, 1].reshape(-1, hidden)

    query, key_value, gate, up = (block + name for name in _FUSED)
    return [
        StoredTensor(their_block + "attention.w_qkv.weight",
                     ((config.n_head + 2 * config.num_key_value_heads) * size, hidden),
                     (query, key_value), split_attention),
        StoredTensor(their_block + "feed_forward.w_gate_hidden.weight", (2 * inner, hidden),
                     (gate, up), split_gate_up),
    ]


def read_mindformers(path):
    """The weights of a MindFormers file, ``.ckpt`` or ``.safetensors``, without its training state.

    Returns:
        name → mindspore.Parameter; the whole file is in memory.

    Raises:
        InputError: there is no such file, or it is broken.
    """
    import mindspore
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise InputError(f"{path} is not a file; give one .ckpt file that holds the whole model")
    refuse_placeholder_file(path)
    file_format = "safetensors" if path.endswith(".safetensors") else "ckpt"
    try:
        return mindspore.load_checkpoint(path, format=file_format,
                                         choice_func=lambda name: not _STATE.fullmatch(name))
    except Exception as error:  # MindSpore raises many kinds for a broken file
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(f"{path} cannot be read as a MindSpore checkpoint ({reason})") from None
