"""Writing a checkpoint directory of ours, a tensor at a time and all or nothing."""

import json
import os

import numpy as np

from telechat.checkpoint import dtypes, layout, safetensors_files, tensor_names, torch_files
from telechat.checkpoint.atomic_replacement import replace_atomically
from telechat.checkpoint.safetensors_files import SafetensorsWriter
from telechat.errors import InputError

# Beside the weights, part of a published model as much as they are.
EXTRA_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
               "special_tokens_map.json", "generation_config.json")
MAX_SHARD_BYTES = 4 * 2**30


def write_checkpoint(directory, config, tensors, max_shard_bytes=MAX_SHARD_BYTES, extra_from=None,
                     shapes=None):
    """Write ``config.json`` and ``model*.safetensors`` (with an index if there are several).

    An older checkpoint in `directory` is replaced as a whole, other files there stay. Until the
    last tensor is on disk nothing of the old one changes. At most one tensor is in memory.

    Args:
        directory: where to; created if need be.
        config: TeleChatConfig; `layout.parameter_shapes` of it says what must come.
        tensors: iterable of (canonical name, numpy array of float32, float16 or bfloat16), any order.
        max_shard_bytes: a file grows no larger than this, unless by a single tensor.
        shapes: name → shape of what must come where that is not the parameters: quantised products, in int32 too.
        extra_from: directory whose tokenizer and generation_config.json are copied along, or None.

    Returns:
        The size of the weights in bytes.

    Raises:
        InputError: a tensor is missing, surplus, of a wrong shape or dtype; `directory` cannot be
            written, or holds torch's weights, with which ours must not mix.
    """
    expected = shapes or layout.parameter_shapes(config)
    refuse_other_weights(directory, torch_files.is_weight_file)
    with replace_atomically(directory, safetensors_files.is_weight_file) as temporary:
        written = {}
        shards = Shards(temporary, list(expected), max_shard_bytes)
        for name, array in tensors:
            if shapes is None or array.dtype != np.int32:
                dtypes.check_dtypes({name: array.dtype.name}, directory)
            if name in written:
                raise InputError(f"{name} came twice while {directory} was written")
            written[name] = array.shape
            shards.add(name, array)
        tensor_names.check_tensors(written, expected, f"what was to be written to {directory}")
        size = shards.close()
        write_json(os.path.join(temporary, "config.json"), config.to_dict())
        copy_extra_files(extra_from, temporary)
    return size


class Shards:
    """Numbered .safetensors files in `directory`, each filled up to `max_bytes`."""

    def __init__(self, directory, names, max_bytes):
        self._directory, self._names, self._max_bytes = directory, names, max_bytes
        self._shard = None
        self._sizes = []
        self._shard_of = {}

    def add(self, name, array):
        """Take one more tensor, a numpy array; a shard that it would make too large is written first."""
        if self._shard and self._shard.size + array.nbytes > self._max_bytes:
            self._finish()
        if not self._shard:
            self._shard = SafetensorsWriter(self._path(len(self._sizes)), self._names)
        self._shard_of[name] = len(self._sizes)
        self._shard.add(name, array)

    def _path(self, number):
        return os.path.join(self._directory, f"shard-{number}")

    def _finish(self):
        self._shard.close()
        self._sizes.append(self._shard.size)
        self._shard = None

    def close(self):
        """Finish the last file, give all their names, write the index; return the bytes of all tensors."""
        if self._shard:
            self._finish()
        files = safetensors_files.shard_names(len(self._sizes))
        for number, file in enumerate(files):
            os.rename(self._path(number), os.path.join(self._directory, file))
        if len(files) > 1:
            weight_map = {name: files[self._shard_of[name]] for name in self._names}
            write_index(os.path.join(self._directory, safetensors_files.INDEX), sum(self._sizes), weight_map)
        return sum(self._sizes)


def write_index(path, total_size, weight_map):
    """Write the index json that transformers reads: bytes of all tensors, and name → file."""
    write_json(path, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def write_json(path, values):
    """Write `values` as indented JSON."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2, ensure_ascii=False)
        file.write("\n")


def copy_extra_files(source, target):
    """Copy those of EXTRA_FILES that the directory `source` has (None: nothing) to the directory `target`.

    Raises InputError where one of them cannot be read.
    """
    for name in EXTRA_FILES if source else ():
        path = os.path.join(source, name)
        if not os.path.isfile(path):
            continue
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror})") from None
        with open(os.path.join(target, name), "wb") as file:
            file.write(content)


def refuse_other_weights(directory, is_other):
    """Raise InputError if `directory` holds a weight file of another kind (`is_other` of its name)."""
    if os.path.isdir(directory):
        for name in sorted(filter(is_other, os.listdir(directory))):
            raise InputError(f"{directory} already holds {name}, weights of another kind; "
                             "give another directory")
