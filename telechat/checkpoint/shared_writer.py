"""A checkpoint that several processes write together, each its own parts of the tensors.

No process ever holds a whole tensor that it has only a part of: the files are laid out first, and
every process writes its parts into place through a memory map. All must see the same directory.
"""

import json
import os

import numpy as np

from telechat.checkpoint import dtypes, safetensors_files
from telechat.checkpoint.layout import parameter_shapes
from telechat.checkpoint.writer import MAX_SHARD_BYTES, write_index, write_json

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class SharedWriter:
    """Layout of the weight files of a model; equal on every process.

    Args:
        directory (str): an empty directory.
        config (TeleChatConfig): decides names and shapes.
        dtype (str): of all tensors.
        max_shard_bytes (int): a file grows no larger, unless by a single tensor.
    """

    def __init__(self, directory, config, dtype, max_shard_bytes=MAX_SHARD_BYTES):
        self.directory = directory
        self.config = config
        self.dtype = dtypes.numpy_dtype(dtype)
        self._code = _CODES[dtype]
        self._shapes = parameter_shapes(config)
        shards = [[]]
        size = 0
        for name, shape in self._shapes.items():
            needed = self._bytes(shape)
            if shards[-1] and size + needed > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += needed
        self._files = dict(zip(safetensors_files.shard_names(len(shards)), shards))
        self._places = {}  # name → (file, offset of its first byte)
        self._headers = {}
        for file, names in self._files.items():
            header, offset = {"__metadata__": {"format": "pt"}}, 0
            for name in names:
                end = offset + self._bytes(self._shapes[name])
                header[name] = {"dtype": self._code, "shape": list(self._shapes[name]), "data_offsets": [offset, end]}
                offset = end
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            self._headers[file] = (text, offset)
            for name in names:
                self._places[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])

    def create(self):
        """Lay the files out, and write config and index; one process does this before any writes a part."""
        for file, (header, size) in self._headers.items():
            with open(os.path.join(self.directory, file), "wb") as handle:
                handle.write(len(header).to_bytes(8, "little") + header)
                # Reserved, not only declared: a full disk shows here and not as a crash in the memory map.
                os.posix_fallocate(handle.fileno(), 8 + len(header), max(size, 1))
        if len(self._files) > 1:
            weight_map = {name: file for name, (file, _) in self._places.items()}
            total = sum(size for _, size in self._headers.values())
            write_index(os.path.join(self.directory, safetensors_files.INDEX), total, weight_map)
        write_json(os.path.join(self.directory, "config.json"), self.config.to_dict())

    def write(self, name, slices, array):
        """Write the part ``slices`` of the tensor ``name``; ``array`` has that part's shape."""
        file, offset = self._places[name]
        target = np.memmap(os.path.join(self.directory, file), self.dtype, "r+", offset, self._shapes[name])
        target[slices] = array
        target.flush()

    def _bytes(self, shape):
        return int(np.prod(shape)) * self.dtype.itemsize
