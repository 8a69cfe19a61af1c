"""A checkpoint of ours as one GGUF file of Llama's architecture, for llama.cpp and what is built on it.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Weights are those of `llama_tensors`; what differs:

- llama.cpp rotates neighbouring pairs of a head, we rotate halves, so the rows of queries and keys are put in pairs.
- Zero biases are left out, which llama.cpp's Llama takes.
- YaRN as TeleChat3 has it is a factor for each frequency, which is stored (``rope_freqs``), and one for cosines and sines.
  In a score of attention the latter appears squared: it goes into the queries' weights.
"""

import contextlib
import os

import numpy as np
from tqdm import tqdm

from telechat.checkpoint.gguf_tokenizer import NO_TOKENIZER, add_tokenizer
from telechat.checkpoint.llama import export_notes, llama_tensors, longest_sequence, open_for_export, rotary_base
from telechat.errors import InputError
from telechat.nn.rotary import yarn_frequencies

TYPES = ("f16", "q8_0", "q4_0", "f32")
BLOCK = 32  # numbers that share a scale in q8_0 and q4_0
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_OF_LAYERS = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
              "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
              "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_BIASES = ("self_attn.o_proj.bias", "mlp.down_proj.bias")  # the others are zero


def to_gguf(mindspore_path, output, type="f16"):
    """Write a checkpoint of ours as a GGUF file; one tensor at a time is in memory.

    Args:
        mindspore_path: directory of ours.
        output: the file; an older one is replaced when the new one is complete.
        type: of the matrices. "f16"; "q8_0", 8 bits and a float16 scale for every 32; "q4_0", 4 bits likewise, embedding
            and head in 8; "f32". Norms and biases are float32.

    Returns:
        (int, list of str): the file's bytes, and what could not be carried over, as sentences; they are in its
        ``general.description`` too.

    Raises:
        InputError: the package gguf is absent; the model has positions that Llama has not (ALiBi); its tokenizer cannot be
            carried over; a weight does not fit float16; the input is broken or the output cannot be written. No file is
            left then, and an older one stays.
    """
    gguf = _package()
    output = os.fspath(output)
    if os.path.isdir(output):
        raise InputError(f"{output} is a directory; give --output the name of a file, as {os.path.join(output, 'model.gguf')}")
    reader = open_for_export(mindspore_path)
    config, partial = reader.config, output + ".partial"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_in_one_piece(partial, output))
        writer = stack.enter_context(contextlib.closing(gguf.GGUFWriter(partial, "llama")))
        _add_sizes(writer, gguf, config, type)
        writer.add_name(os.path.basename(os.path.abspath(mindspore_path)))
        notes = export_notes(config)
        if not add_tokenizer(writer, gguf, mindspore_path, config):
            notes.append(NO_TOKENIZER)
        tensors = dict(_tensors(config, reader.read))
        types = {name: _stored_type(name, shape, type) for name, (shape, _) in tensors.items()}
        if "f16" in types.values() and type in ("q8_0", "q4_0"):
            notes.append(f"Matrices whose rows are no multiple of {BLOCK} are stored as f16, not {type}.")
        writer.add_description("\n".join(notes))
        for name, (shape, _) in tensors.items():
            quantisation = gguf.GGMLQuantizationType[types[name].upper()]
            size = gguf.quant_shape_to_byte_shape(shape, quantisation) if types[name][0] == "q" else None
            kept = np.dtype(np.uint8 if size else types[name].replace("f", "float"))
            writer.add_tensor_info(name, size or shape, kept, int(np.prod(size or shape)) * kept.itemsize, quantisation)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (_, make) in tqdm(tensors.items(), desc="exporting", unit="tensor"):
            writer.write_tensor_data(_encoded(gguf, name, np.ascontiguousarray(make(), np.float32), types[name]))
    return os.path.getsize(output), notes


def _package():
    try:
        import gguf
    except ImportError as error:
        raise InputError(f"to-gguf needs the package {error.name}; pip install 'telechat[export]'") from None
    return gguf


@contextlib.contextmanager
def _in_one_piece(partial, output):
    """Have a file written under the name ``partial``, flushed and renamed to ``output`` at the end, or not left at all."""
    try:
        yield
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, output)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(partial)
        if isinstance(error, OSError):
            raise InputError(f"{output} cannot be written ({error.strerror or error}); free some space or give another "
                             "--output") from error
        raise


def _add_sizes(writer, gguf, config, type):
    """What llama.cpp needs to know of the model besides its weights."""
    writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32"}.get(type, f"MOSTLY_{type.upper()}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(longest_sequence(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rotary_base(config))


def _tensors(config, read):
    """(name of GGUF's, (shape, function that makes the array)) of each tensor."""
    heads = {"self_attn.q_proj": config.n_head, "self_attn.k_proj": config.num_key_value_heads}
    shapes = _shapes(config)
    factor = 1.0
    if config.yarn is not None:
        frequencies, factor = yarn_frequencies(config)
        plain = float(config.rotary_base) ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        yield "rope_freqs.weight", ((config.head_dim // 2,), lambda: (plain / frequencies).astype(np.float32))
    for name, make in llama_tensors(config, read).items():
        module, kind = name.rsplit(".", 1)
        layer, part = "", module
        if name.startswith("model.layers."):
            _, _, layer, part = module.split(".", 3)
        if kind == "bias" and not name.endswith(_BIASES):
            continue
        if part in heads:
            make = _in_pairs(make, heads[part], factor ** 2 if part == "self_attn.q_proj" else 1.0)
        target = f"blk.{layer}.{_OF_LAYERS[part]}.{kind}" if layer else f"{_NAMES[part]}.{kind}"
        yield target, (shapes[part] if kind == "weight" else shapes[part][:1], make)


def _shapes(config):
    """Shape of each part's weight, by Llama's name within a layer."""
    hidden, inner, vocabulary = (config.hidden_size,), config.ffn_hidden_size, config.vocab_size
    queries, keys = config.n_head * config.head_dim, config.num_key_value_heads * config.head_dim
    return {"model.embed_tokens": (vocabulary, *hidden), "lm_head": (vocabulary, *hidden), "model.norm": hidden,
            "input_layernorm": hidden, "post_attention_layernorm": hidden, "self_attn.q_proj": (queries, *hidden),
            "self_attn.k_proj": (keys, *hidden), "self_attn.v_proj": (keys, *hidden), "self_attn.o_proj": (*hidden, queries),
            "mlp.gate_proj": (inner, *hidden), "mlp.up_proj": (inner, *hidden), "mlp.down_proj": (*hidden, inner)}


def _in_pairs(make, heads, factor):
    """Rows of each head reordered so that what rotates together, i and i + D/2, stands side by side."""
    def reorder():
        array = make().astype(np.float32) * np.float32(factor)
        return array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
    return reorder


def _stored_type(name, shape, type):
    if len(shape) == 1 or type == "f32":
        return "f32"
    if type[0] == "q" and shape[-1] % BLOCK:
        return "f16"
    return "q8_0" if type == "q4_0" and name in ("token_embd.weight", "output.weight") else type


def _encoded(gguf, name, array, type):
    """A float32 array as it is stored."""
    if type == "f32":
        return array
    if not np.abs(array).max(initial=0) <= np.finfo(np.float16).max:
        raise InputError(f"{name} holds a number that is outside float16, which {type} needs; give --type f32")
    if type == "f16":
        return array.astype(np.float16)
    return gguf.quants.quantize(array, gguf.GGMLQuantizationType[type.upper()])
