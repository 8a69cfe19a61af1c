"""Conversion between published torch checkpoints, MindFormers' files and ours."""

import itertools
import math
import os

import numpy as np
from tqdm import tqdm

from telechat.adapters.peft import AdaptedReader
from telechat.checkpoint import layout, safetensors_files, tensor_names, torch_files
from telechat.checkpoint.dtypes import cast, check_dtypes, numpy_dtype
from telechat.checkpoint.mindformers import mindformers_tensors, read_mindformers
from telechat.checkpoint.reader import CheckpointReader, say_unwrapped
from telechat.checkpoint.atomic_replacement import replace_atomically
from telechat.checkpoint.safetensors_files import SafetensorsFiles
from telechat.checkpoint.torch_files import TorchFiles
from telechat.checkpoint.writer import (copy_extra_files, refuse_other_weights, write_checkpoint, write_index,
                                        write_json)
from telechat.config import TeleChatConfig
from telechat.errors import InputError
from telechat.quantization.checkpoint import canonical_products, quantised_shapes, stored_tensors, with_settings
from telechat.quantization.gptq import GptqFiles, quantisation_settings
from telechat.foreign import refuse_foreign_names

MODEL_NAMES = ("telechat_7b", "telechat_12b", "telechat_52b", "telechat2", "telechat3")
TORCH_SHARD_BYTES = 2 * 2**30  # a .bin file is in memory while it is written


def torch_to_ms(torch_path, mindspore_path, dtype=None, model_name=None, dequantize=False):
    """Convert a published (or fine-tuned) torch checkpoint to a directory of ours.

    Args:
        torch_path: directory with config.json and the weights: ``pytorch_model*.bin`` in either of
            torch's formats, or ``model*.safetensors``; names with or without ``transformer.``.
        mindspore_path: directory to write; what it holds of an older conversion is replaced.
        dtype: "float32", "float16" or "bfloat16" to cast to (nearest, ties to even); None: as it is.
        model_name: one of MODEL_NAMES to make sure that the layout is that model's, or None.
        dequantize: weights that AutoGPTQ quantised to 4 or 8 bits become ordinary ones; they stay quantised else.

    Returns:
        Bytes of the weights written. Peak memory is one tensor (one file for torch's old format).

    Raises:
        InputError: something of the input is absent, broken or does not fit its config.json; the
            output cannot be written. Nothing has changed then.
    """
    torch_path = os.fspath(torch_path)
    _check_directories(torch_path, mindspore_path)
    if dtype is not None:
        numpy_dtype(dtype)
    config = TeleChatConfig.from_pretrained(torch_path, quantised=True)
    _check_model_name(config, model_name, torch_path)
    files, settings = _open_weights(torch_path, config, dequantize)
    stored = _recognise(files, config, torch_path)
    shapes, quantised = layout.parameter_shapes(config), set()
    config = with_settings(config, settings)
    if settings is not None:
        quantised = {parameter for name, tensor in stored.items() if files.is_quantised(name)
                     for parameter in tensor.parameters}
        shapes = quantised_shapes(shapes, quantised, settings["bits"], settings["group_size"])

    shares = {}  # of parameters that several tensors make up, until the last of them is read

    def convert(file):
        if settings is None:
            for name, array in files.tensors(file):
                if name in stored:
                    yield from _parameters(stored[name], array, dtype, shares)
            return
        for name in filter(stored.__contains__, files.names(file)):
            if not files.is_quantised(name):
                yield from _parameters(stored[name], files.read(name), dtype, shares)
                continue
            for parameter, product in canonical_products(stored[name], files.product(name), files.transposed, shares):
                yield from stored_tensors(parameter, product, settings["bits"])

    with tqdm(files.files, desc="converting", unit="shard") as shards:
        # A generator a file: what one file's tensors hold is let go before the next is opened.
        tensors = itertools.chain.from_iterable(map(convert, shards))
        return write_checkpoint(mindspore_path, config, tensors, extra_from=torch_path,
                                shapes=shapes if quantised else None)


def _parameters(tensor, array, dtype, shares=None):
    """Iterate over (canonical name, array) of what `array`, the StoredTensor `tensor`, completes.

    shares: name → array of the tensors read so far whose partners were not.
    """
    if tensor.partners:
        shares[tensor.name], = tensor.split(array)
        if not all(name in shares for name in tensor.partners):
            return
        array = tensor.combine(*(shares.pop(name) for name in tensor.partners))
    parts = (array,) if tensor.partners else tensor.split(array)
    for parameter, part in zip(tensor.parameters, parts):
        yield parameter, cast(part, dtype, parameter)


def _open_weights(directory, config, dequantize):
    """The weights, and the settings of GPTQ where they are to stay quantised."""
    settings = quantisation_settings(directory)
    if settings is not None:
        biases = {tensor.name for tensor in layout.official_parameters(config) if tensor.name.endswith(".bias")}
        files = GptqFiles(directory, settings, biases, transposed=config.style == "gpt2")
        return files, None if dequantize else settings
    if dequantize:
        raise InputError(f"{directory} holds no weights that AutoGPTQ quantised; leave --dequantize out")
    if any(map(safetensors_files.is_weight_file, os.listdir(directory))):
        return SafetensorsFiles(directory), None
    if not torch_files.torch_weight_files(directory):
        raise InputError(f"{directory} holds neither pytorch_model*.bin nor model*.safetensors")
    return TorchFiles(directory), None


def _recognise(files, config, directory):
    """Found name → StoredTensor, for all weights in `files`, of the layout that they are in."""
    found = {name: shape for name, shape in files.shapes.items() if not layout.is_buffer(name)}
    refuse_foreign_names(directory, found)
    _drop_tied_head(files, config, found)
    candidates = []
    for tensors in (layout.official_parameters(config), layout.canonical_tensors(config)):
        stored = {tensor.name: tensor for tensor in tensors}
        names = tensor_names.match_names(found, stored)
        shapes = {names[name]: shape for name, shape in found.items()}
        expected = {tensor.name: tensor.shape for tensor in tensors}
        faults = sum(map(len, tensor_names.mismatches(shapes, expected)))
        candidates.append((faults, names, stored, shapes, expected))
    _, names, stored, shapes, expected = min(candidates, key=lambda candidate: candidate[0])
    tensor_names.check_tensors(shapes, expected, directory)
    check_dtypes({name: files.dtypes[name] for name in found}, directory)
    say_unwrapped(directory, names)
    return {name: stored[names[name]] for name in found}


def _drop_tied_head(files, config, found):
    """A tied model saved by torch may repeat the embedding as its head: leave that out of `found`."""
    head = next((name for name in found if name.endswith("lm_head.weight")), None)
    embedding = next((name for name in found if name.endswith(("word_embeddings.weight", "embed_tokens.weight"))), None)
    if not config.tie_word_embeddings or not (head and embedding) or found[head] != found[embedding]:
        return
    bits = (array.view(f"u{array.itemsize}") for array in (files.read(head), files.read(embedding)))
    if np.array_equal(*bits):
        del found[head]


def ms_to_torch(mindspore_path, torch_path, format="bin", dtype=None, max_shard_bytes=TORCH_SHARD_BYTES):
    """Convert a directory of ours to the published names and layout, with its index json.

    Args:
        mindspore_path: directory of ours.
        torch_path: directory to write; what it holds of an older conversion is replaced.
        format: "bin" (torch's zip format) or "safetensors".
        dtype: "float32", "float16" or "bfloat16" to cast to; None: as it is.
        max_shard_bytes: a file grows no larger than this, unless by a single tensor; a .bin file is
            in memory while it is written.

    Returns:
        Bytes of the weights written.

    Raises:
        InputError: the input is broken or does not fit its config.json; torch is not installed; the
            output cannot be written. Nothing has changed then.
    """
    if format not in ("bin", "safetensors"):
        raise InputError(f'format must be "bin" or "safetensors", not {format!r}')
    _check_directories(mindspore_path, torch_path)
    reader = CheckpointReader(mindspore_path)
    config = reader.config
    reader.check(layout.parameter_shapes(config))
    tensors = {tensor.name: tensor for tensor in layout.official_tensors(config)}
    stored_dtypes = {name: numpy_dtype(dtype) if dtype else _common_dtype(reader, tensor)
                     for name, tensor in tensors.items()}
    sizes = {name: math.prod(tensor.shape) * stored_dtypes[name].itemsize
             for name, tensor in tensors.items()}
    shards = _plan(sizes, max_shard_bytes)

    def make(name):
        target = stored_dtypes[name].name
        parts = [cast(reader.read(parameter), target, parameter) for parameter in tensors[name].parameters]
        return cast(tensors[name].join(*parts), target, name)

    kind, other = torch_files, safetensors_files
    if format == "safetensors":
        kind, other = other, kind
    refuse_other_weights(torch_path, other.is_weight_file)
    with replace_atomically(torch_path, kind.is_weight_file) as temporary:
        file_of = {}
        # Published 7B and 12B files have an underscore before the number, 52B files a hyphen.
        files = kind.shard_names(len(shards), separator="-" if config.style == "gpt2" else "_")
        with tqdm(list(zip(files, shards)), desc="converting", unit="shard") as progress:
            for file, names in progress:
                kind.save(os.path.join(temporary, file), {name: make(name) for name in names})
                file_of.update(dict.fromkeys(names, file))
        if files != ["model.safetensors"]:
            write_index(os.path.join(temporary, kind.INDEX), sum(sizes.values()), file_of)
        write_json(os.path.join(temporary, "config.json"), config.to_dict())
        copy_extra_files(mindspore_path, temporary)
    return sum(sizes.values())


def _common_dtype(reader, tensor):
    """Numpy dtype for a published tensor: that of its parameters, or of the embedding if it has none."""
    found = {reader.dtype(name) for name in tensor.parameters or ("transformer.word_embeddings.weight",)}
    if len(found) > 1:
        raise InputError(f"{' and '.join(tensor.parameters)} have different dtypes in {reader.directory} "
                         "but are one tensor in the published layout; give --dtype")
    return found.pop()


def _plan(sizes, max_bytes):
    """Names of `sizes` (name → bytes) in order, cut into lists of at most `max_bytes` (or of one name)."""
    shards, filled = [], 0
    for name, size in sizes.items():
        if not shards or filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def merge_lora(load_checkpoint, lora, output_dir):
    """Write a checkpoint of ours with a LoRA adapter added to its weights.

    Args:
        load_checkpoint: directory of ours, the adapter's base model.
        lora: directory of the adapter, as the peft package saves it.
        output_dir: directory to write; what it holds of an older conversion is replaced.

    Returns:
        Bytes of the weights written. Sums are in float32, and rounded once to each weight's dtype.

    Raises:
        InputError: something of the input is absent, broken or does not fit together; the output cannot be written.
    """
    _check_directories(load_checkpoint, output_dir)
    reader = AdaptedReader(load_checkpoint, lora)
    reader.check(layout.parameter_shapes(reader.config))
    with tqdm(reader.names, desc="merging", unit="tensor") as names:
        return write_checkpoint(output_dir, reader.config, ((name, reader.read(name)) for name in names),
                                extra_from=load_checkpoint)


def mindformers_to_ms(checkpoint, config, mindspore_path, mp=1, dtype=None):
    """Convert one MindFormers file, as its converter or its training wrote it, to a directory of ours.

    Args:
        checkpoint: the ``.ckpt`` file with the whole model.
        config: the published config.json of the model, or the directory that holds it; a tokenizer and
            a generation_config.json beside it are copied along.
        mindspore_path: directory to write; what it holds of an older conversion is replaced.
        mp: the ``--mp`` that a 52B file was converted for (see `mindformers.mindformers_tensors`).
        dtype: "float32", "float16" or "bfloat16" to cast to; None: as it is.

    Returns:
        Bytes of the weights written. The whole file is in memory.

    Raises:
        InputError: the input is broken or does not fit the config; the output cannot be written.
            Nothing has changed then.
    """
    if dtype is not None:
        numpy_dtype(dtype)
    path = os.fspath(config)
    # The file and not its directory, which may well hold the MindFormers files that are converted.
    config = TeleChatConfig.from_pretrained(os.path.join(path, "config.json") if os.path.isdir(path) else path)
    stored = mindformers_tensors(config, mp)
    found = read_mindformers(checkpoint)
    tensor_names.check_tensors({name: value.shape for name, value in found.items()},
                         {tensor.name: tensor.shape for tensor in stored}, checkpoint)

    def convert(tensor):
        return _parameters(tensor, found.pop(tensor.name).asnumpy(), dtype)

    extra_from = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
    with tqdm(stored, desc="converting", unit="tensor") as progress:
        tensors = itertools.chain.from_iterable(map(convert, progress))
        return write_checkpoint(mindspore_path, config, tensors, extra_from=extra_from)


def _check_directories(source, target):
    if not os.path.isdir(source):
        raise InputError(f"{source} is not a directory; give the one that holds config.json and the weights")
    if os.path.realpath(source) == os.path.realpath(target):
        raise InputError(f"{source} is both input and output; give another output directory")


def _check_model_name(config, model_name, directory):
    if model_name is None:
        return
    if model_name not in MODEL_NAMES:
        raise InputError(f"model_name must be one of {', '.join(MODEL_NAMES)}, not {model_name}")
    found = layout.published_name(config)
    if model_name != found:
        raise InputError(f"{directory} is of the layout of {found}, not of {model_name}; "
                         "give the right --model_name or leave it out")
