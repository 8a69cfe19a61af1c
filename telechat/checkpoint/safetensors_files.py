"""Reading and writing .safetensors files, a slice or a tensor at a time."""

import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from safetensors import SafetensorError, safe_open

from telechat.checkpoint.dtypes import numpy_dtype
from telechat.content import sampled_digest
from telechat.errors import InputError
from telechat.text_files import read_json_object, refuse_placeholder_file

INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
# Bytes that a thread reads at a time, and how many threads do: one copies 3.5 GB/s out of the page cache.
PART, READERS = 1 << 24, min(os.cpu_count() or 1, 4)
_CODES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I32": "int32"}


def is_weight_file(name):
    """Whether a file of this name is part of a safetensors checkpoint, its index included."""
    return name == INDEX or _WEIGHTS.fullmatch(name) is not None


def weight_digests(directory):
    """`sampled_digest` of each file of a safetensors checkpoint, by name: whether two directories hold the same weights.

    Raises:
        InputError: a file cannot be read.
    """
    names = sorted(filter(is_weight_file, os.listdir(directory)))
    return {name: sampled_digest(os.path.join(directory, name)) for name in names}


def indexed_files(path):
    """The file names, sorted, that the index json at `path` lists.

    Raises:
        InputError: it is no index, or one of the files is not beside it.
    """
    try:
        names = sorted(set(read_json_object(path, "download it again")["weight_map"].values()))
        if not all(isinstance(name, str) for name in names):
            raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise InputError(f'{path} is not a weight index (a JSON object with a "weight_map"); '
                         "download it again") from None
    for name in names:
        if not os.path.isfile(os.path.join(os.path.dirname(path), name)):
            raise InputError(f"{path} lists {name}, which is not there; download or copy it")
    return names


class SafetensorsFiles:
    """The tensors of a directory's ``model*.safetensors`` (of those its index lists, where it has one).

    Attributes:
        shapes: name → shape; dtypes: name → dtype name (a code of the format where numpy has none).

    Args:
        directory: their directory.
        files: names of other files there to read instead; None.

    Raises:
        InputError: there is none, one is broken, or two hold the same tensor.
    """

    def __init__(self, directory, files=None):
        self.directory = os.fspath(directory)
        index = os.path.join(self.directory, INDEX)
        if files is not None:
            self.files = files
        elif os.path.isfile(index):
            self.files = indexed_files(index)
        else:
            self.files = sorted(filter(_WEIGHTS.fullmatch, os.listdir(self.directory)))
        if not self.files:
            raise InputError(f"{self.directory} holds no model.safetensors")
        self.shapes, self.dtypes, self._file_of, self._offsets = {}, {}, {}, {}
        for file in self.files:
            self._open(file)

    def _open(self, file):
        path = os.path.join(self.directory, file)
        refuse_placeholder_file(path)
        try:
            handle = safe_open(path, framework="np")
            for name in handle.keys():
                if name in self.shapes:
                    raise InputError(f"{name} is in both {self._file_of[name]} and {file} of "
                                     f"{self.directory}; remove the file that does not belong there")
                tensor = handle.get_slice(name)
                self.shapes[name] = tuple(tensor.get_shape())
                self.dtypes[name] = _CODES.get(tensor.get_dtype(), tensor.get_dtype())
                self._file_of[name] = file
            self._offsets.update(_offsets(path))
        except SafetensorError as error:
            raise InputError(f"{path} is broken or cut short ({error}); copy or convert it again") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error})") from None

    def read(self, name, index=None):
        """The tensor called `name`, or only its part ``[index]`` (a tuple of slices), as a numpy array.

        Raises InputError where the file is broken or has changed since it was opened.
        """
        path = os.path.join(self.directory, self._file_of[name])
        rows = whole_rows(self.shapes[name], index)
        try:
            if rows is not None and self.dtypes[name] in _CODES.values():
                return self._read_rows(path, name, rows)
            if self.dtypes[name] == "bfloat16":
                numpy_dtype("bfloat16")  # registers it with numpy, which safetensors asks for it
            # Opened anew: what was read through a mapping counts as the process's memory until it is closed.
            with safe_open(path, framework="np") as handle:
                return handle.get_tensor(name) if index is None else handle.get_slice(name)[index]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read ({error}); has it been changed meanwhile?") from None

    def _read_rows(self, path, name, rows):
        """Without safetensors, whose mapping would be in memory beside the array; a fifth of its time, too."""
        dtype, shape = self.dtypes[name], self.shapes[name]
        if shape:
            shape = len(rows), *shape[1:]
        array = np.empty(shape, np.int32 if dtype == "int32" else numpy_dtype(dtype))
        start = rows.start * array.itemsize * math.prod(shape[1:])
        read_into(memoryview(array.reshape(-1).view(np.uint8)), path, self._offsets[name] + start)
        return array

    def names(self, file):
        """Names of the tensors in one of `files`."""
        return [name for name, owner in self._file_of.items() if owner == file]

    def tensors(self, file):
        """Iterate over (name, array) of one of `files`."""
        for name in self.names(file):
            yield name, self.read(name)


def whole_rows(shape, index):
    """The rows, a range, that ``index`` (a tuple of slices, or None) takes of a tensor, or None where it cuts other axes too."""
    parts = [part.indices(size) for part, size in zip(index or (), shape)]
    if any(part != (0, size, 1) for part, size in zip(parts[1:], shape[1:])) or any(step != 1 for *_, step in parts[:1]):
        return None
    return range(*parts[0]) if parts else range(shape[0] if shape else 1)


def read_into(buffer, path, offset):
    """Fill a writable memoryview of bytes with those at ``offset`` of a file, large parts by several threads.

    Raises:
        OSError: the file cannot be read, or ends before.
    """
    parts = [(buffer[start:start + PART], path, offset + start) for start in range(0, len(buffer), PART)]
    if len(parts) > 1:
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda part: _read_part(*part), parts))
    else:
        _read_part(buffer, path, offset)


def _read_part(buffer, path, offset):
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while len(buffer):
            count = file.readinto(buffer)
            if not count:
                raise OSError("it ends within a tensor")
            buffer = buffer[count:]


def _offsets(path):
    """Name → where a tensor's bytes begin in the file. The format: the header's length in 8 bytes, JSON, data."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


class SafetensorsWriter:
    """Writes one .safetensors file tensor by tensor, so that only one need be in memory.

    The format puts a JSON header before the data. Its size must be fixed before the first tensor
    comes, so room is reserved for all `names`, and what is left is blanks, as the format allows.
    """

    def __init__(self, path, names):
        # 150 bytes: the longest dtype, shape and offsets there can be, and their punctuation.
        self._room = 64 + sum(len(name.encode()) + 150 for name in names) // 8 * 8
        self._header = {"__metadata__": {"format": "pt"}}  # transformers reads no file without it
        self._file = open(path, "wb")
        self._file.seek(8 + self._room)
        self.size = 0

    def add(self, name, array):
        """Append `array` (float32, float16, bfloat16 or int32)."""
        code = next(code for code, dtype in _CODES.items() if dtype == array.dtype.name)
        self._header[name] = {"dtype": code, "shape": list(array.shape),
                              "data_offsets": [self.size, self.size + array.nbytes]}
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        self.size += array.nbytes

    def close(self):
        """Write the header and close the file."""
        header = json.dumps(self._header, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()


def shard_names(count, separator="-"):
    """File names of `count` shards: ``model.safetensors``, or ``model-00001-of-00003.safetensors`` etc."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def save(path, tensors):
    """Write `tensors` (name → numpy array) as one file.

    Raises:
        OSError: the file cannot be written.
    """
    writer = SafetensorsWriter(path, tensors)
    for name, array in tensors.items():
        writer.add(name, array)
    writer.close()
