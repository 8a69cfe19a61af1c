"""A checkpoint of ours as a ``LlamaForCausalLM`` directory, which transformers, vLLM and llama.cpp read without our code.

The block is Llama's: what differs is brought into its form. Keys and values come apart; biases that Llama either has for all
products of a part or for none are filled up with zeros; muP's multipliers go into embedding and head; and the rotary
base is the one that the model has within its training length.
"""

import math
import os
import shutil

import numpy as np
from tqdm import tqdm

from telechat.checkpoint import layout, safetensors_files
from telechat.checkpoint.chat_jinja import chat_jinja
from telechat.checkpoint.reader import CheckpointReader
from telechat.checkpoint.atomic_replacement import replace_atomically
from telechat.checkpoint.writer import EXTRA_FILES, MAX_SHARD_BYTES, Shards, write_json
from telechat.data.conversation import ChatFormat
from telechat.data.sentencepiece_bytes import user_defined
from telechat.data.tokenizer import Tokenizer
from telechat.errors import InputError
from telechat.nn.rotary import fixed_tables_length, ntk_alpha, yarn_frequencies

NOTE = "EXPORT.md"


def to_llama(mindspore_path, output_dir):
    """Write a checkpoint of ours as a LlamaForCausalLM directory.

    Args:
        mindspore_path: directory of ours.
        output_dir: directory to write; what it holds of an older one is replaced.

    Returns:
        (int, list of str): bytes of the weights, and what could not be carried over, as sentences; they are in
        ``EXPORT.md`` too.

    Raises:
        InputError: the model has positions that Llama has not (ALiBi); the input is broken; the output cannot be written.
            Nothing has changed then.
    """
    if os.path.realpath(mindspore_path) == os.path.realpath(output_dir):
        raise InputError(f"{mindspore_path} is both input and output; give another --output_dir")
    reader = open_for_export(mindspore_path)
    config = reader.config
    notes = export_notes(config) + _tokenizer_notes(mindspore_path)
    with replace_atomically(output_dir, safetensors_files.is_weight_file) as temporary:
        size = _write_weights(reader, config, temporary)
        values = _config(config, reader)
        write_json(os.path.join(temporary, "config.json"), values)
        _write_tokenizer(mindspore_path, temporary)
        with open(os.path.join(temporary, NOTE), "w", encoding="utf-8") as file:
            file.write("\n".join(["A TeleChat model in Llama's form, written by telechat.", "", *(f"- {note}" for note in notes)])
                       + "\n")
    return size, notes


def open_for_export(mindspore_path):
    """The reader of a checkpoint of ours that Llama's block can express.

    Raises:
        InputError: it cannot, or the checkpoint is broken.
    """
    reader = CheckpointReader(mindspore_path)
    config = reader.config
    if config.position_embedding != "rotary":
        raise InputError(f"{mindspore_path} has ALiBi in place of rotary positions, which Llama has not; it cannot be exported")
    if config.tie_word_embeddings and config.input_mult != 1:
        raise InputError(f"{mindspore_path} has an input_mult beside tied embeddings, which Llama has not; it cannot be exported")
    reader.check(layout.parameter_shapes(config))
    return reader


def llama_tensors(config, read):
    """Name of Llama's → function that makes its array from ``read(canonical name)``, in file order."""
    def as_is(name):
        return lambda: read(name)

    def half(name, index):
        return lambda: layout.separate_heads(read(name), config.num_key_value_heads)[index]

    def times(name, factor):
        def make():
            array = read(name)
            return array if factor == 1 else (array.astype(np.float32) * np.float32(factor)).astype(array.dtype)
        return make

    def zeros(like, rows):
        return lambda: np.zeros(rows, read(like).dtype)

    heads, keys = config.n_head * config.head_dim, config.num_key_value_heads * config.head_dim
    tensors = {"model.embed_tokens.weight": times("transformer.word_embeddings.weight", config.input_mult)}
    for layer in range(config.n_layer):
        ours, theirs = f"transformer.h.{layer}.", f"model.layers.{layer}."
        attention, mlp = ours + "self_attention.", ours + "mlp."
        tensors.update({
            theirs + "input_layernorm.weight": as_is(ours + "input_layernorm.weight"),
            theirs + "self_attn.q_proj.weight": as_is(attention + "query.weight"),
            theirs + "self_attn.k_proj.weight": half(attention + "key_value.weight", 0),
            theirs + "self_attn.v_proj.weight": half(attention + "key_value.weight", 1),
            theirs + "self_attn.o_proj.weight": as_is(attention + "dense.weight"),
            theirs + "post_attention_layernorm.weight": as_is(ours + "post_attention_layernorm.weight"),
            **{f"{theirs}mlp.{name}.weight": as_is(f"{mlp}{name}.weight") for name in ("gate_proj", "up_proj", "down_proj")}})
        if config.use_bias:
            norm = ours + "input_layernorm.weight"
            tensors.update({
                theirs + "self_attn.o_proj.bias": as_is(attention + "dense.bias"),
                theirs + "mlp.down_proj.bias": as_is(mlp + "down_proj.bias"),
                **{f"{theirs}self_attn.{name}.bias": zeros(norm, rows) for name, rows in
                   (("q_proj", heads), ("k_proj", keys), ("v_proj", keys))},
                **{f"{theirs}mlp.{name}.bias": zeros(norm, config.ffn_hidden_size) for name in ("gate_proj", "up_proj")}})
    tensors["model.norm.weight"] = as_is("transformer.ln_f.weight")
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = times("lm_head.weight", config.logits_scale)
    elif config.logits_scale != 1:
        # The head alone is scaled: Llama can have it so where it is a weight of its own.
        tensors["lm_head.weight"] = times("transformer.word_embeddings.weight", config.logits_scale)
    return tensors


def _write_weights(reader, config, directory):
    tensors = llama_tensors(config, reader.read)
    shards = Shards(directory, list(tensors), MAX_SHARD_BYTES)
    for name, make in tqdm(tensors.items(), desc="exporting", unit="tensor"):
        shards.add(name, np.ascontiguousarray(make()))
    return shards.close()


def _config(config, reader):
    """The content of Llama's config.json."""
    dtype = reader.dtype("transformer.ln_f.weight").name
    scaling = None
    if config.yarn is not None:
        original = config.yarn.original_max_position_embeddings
        scaling = {"rope_type": "yarn", "factor": config.training_seqlen / original, "beta_fast": config.yarn.beta_fast,
                   "beta_slow": config.yarn.beta_slow, "original_max_position_embeddings": original,
                   "attention_factor": yarn_frequencies(config)[1], "truncate": True}
    tied = config.tie_word_embeddings and config.logits_scale == 1
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype, "hidden_act": "silu",
            "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "intermediate_size": config.ffn_hidden_size,
            "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
            "num_key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim,
            "rms_norm_eps": config.layer_norm_epsilon, "max_position_embeddings": longest_sequence(config),
            "rope_theta": rotary_base(config), "rope_scaling": scaling, "attention_bias": config.use_bias,
            "mlp_bias": config.use_bias,
            "attention_dropout": config.attention_dropout, "initializer_range": config.initializer_range,
            "tie_word_embeddings": tied, "bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id,
            "eos_token_id": list(config.eos_token_id) if isinstance(config.eos_token_id, tuple) else config.eos_token_id}


def rotary_base(config):
    """The base of the rotary table within the training length."""
    if config.yarn is None and config.rotary_ntk_context is not None and not config.rotary_ntk_scales_theta:
        alpha = ntk_alpha(config.training_seqlen, config.rotary_ntk_context)
        return config.rotary_base * alpha ** (config.head_dim / (config.head_dim - 2))
    return config.rotary_base


def longest_sequence(config):
    """Tokens up to which one rotary table serves."""
    fixed = fixed_tables_length(config)
    return config.training_seqlen if math.isinf(fixed) else min(config.training_seqlen, fixed)


def export_notes(config):
    """What Llama's form does not carry over, as sentences."""
    notes = []
    if config.rotary_ntk_context is not None:
        notes.append(f"The extension of the context beyond {longest_sequence(config)} tokens (NTK) is not carried over: "
                     "Llama's rotary table has one base.")
    if config.rotary_float16:
        notes.append("The official code rounds cosines and sines to float16, Llama's does not: logits differ by up to 3e-3 of "
                     "the largest (measured on small models of 7B, 12B and TeleChat2), and by nothing else.")
    if config.hidden_dropout or config.embedding_dropout:
        notes.append("Dropout of the hidden states in training is not carried over.")
    notes.append("The chat template writes turns with the model's control tokens; tools are not in it.")
    return notes


def _tokenizer_notes(source):
    """What transformers' tokenizer does in another way than the checkpoint's, as sentences."""
    path = os.path.join(source, "tokenizer.model")
    if not os.path.isfile(path):
        return []
    with open(path, "rb") as file:
        if not user_defined(file.read()):
            return []
    return ["Where a text begins with a piece that the tokenizer's maker defined, such as a digit or the end of a line, "
            "transformers 5 leaves out the ▁ in front of it. Behind a space, as the chat template writes it, the ids are those "
            "that the model was trained with."]


def _write_tokenizer(source, target):
    """The tokenizer's files, with a tokenizer_config.json for transformers that has the chat template."""
    for name in EXTRA_FILES:  # but for the template, which is written below for what transformers' tokenizer does
        if name != "chat_template.jinja" and os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
    if not any(os.path.isfile(os.path.join(source, name)) for name in ("tokenizer.model", "tokenizer.json")):
        return
    tokenizer = Tokenizer.from_pretrained(source)
    chat = ChatFormat.for_tokenizer(tokenizer)
    spelling = {role: item["token"] for role, item in chat.tokens(tokenizer).items()}
    is_sentencepiece = tokenizer.file_name == "tokenizer.model"
    settings = {"tokenizer_class": "LlamaTokenizer" if is_sentencepiece else "PreTrainedTokenizerFast",
                "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": False,
                "eos_token": spelling["end"], "pad_token": spelling["pad"],
                "chat_template": chat_jinja(chat, spelling, " " if is_sentencepiece else ""),
                "added_tokens_decoder": {str(index): {
                    "content": tokenizer.id_to_token(index), "lstrip": False, "normalized": False, "rstrip": False,
                    "single_word": False, "special": True} for index in sorted(tokenizer.control_ids)}}
    write_json(os.path.join(target, "tokenizer_config.json"), settings)
