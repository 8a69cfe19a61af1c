"""Reading a checkpoint directory of ours, whole tensors or slices of them."""

import math
import os
import shlex
import sys

import numpy as np

from telechat.checkpoint import dtypes, layout, tensor_names
from telechat.checkpoint.atomic_replacement import finish_replacement
from telechat.checkpoint.safetensors_files import SafetensorsFiles, is_weight_file
from telechat.checkpoint.torch_files import torch_weight_files
from telechat.config import TeleChatConfig
from telechat.errors import InputError


PART = 1 << 22  # bytes that are read at a time where a tensor is converted


class CheckpointReader:
    """A directory of ``config.json`` and ``model*.safetensors`` with canonical names.

    Opening reads headers only; `read` reads what it is asked for. ``quantised``: whether there may be tensors of quantised
    products (quantization/checkpoint.py), which are refused elsewhere.

    Attributes:
        directory: its path.
        config: the TeleChatConfig of its ``config.json``.
        names: list of the tensors' names, in the model's order.

    Raises:
        InputError: ``config.json`` or the weights are absent or broken, or the weights are in a
            published layout and must be converted first.
    """

    def __init__(self, directory, quantised=False):
        self.directory = os.fspath(directory)
        if not os.path.isdir(self.directory):
            raise InputError(f"{self.directory} is not a directory; "
                             "give one with config.json and model.safetensors")
        finish_replacement(self.directory)
        self.config = TeleChatConfig.from_pretrained(self.directory, quantised)
        convert = ("run `python tools/convert.py torch-to-ms "
                   f"--torch_path {shlex.quote(self.directory)} --mindspore_path DIR` and give that DIR")
        is_ours = any(map(is_weight_file, os.listdir(self.directory)))
        if not is_ours and torch_weight_files(self.directory):
            raise InputError(f"{self.directory} holds torch weights (.bin): {convert}")
        self._files = SafetensorsFiles(self.directory)
        canonical = layout.parameter_shapes(self.config)
        matched = tensor_names.match_names(self._files.shapes, canonical, with_prefix=False)
        left = [name for name, ours in matched.items() if ours not in canonical]
        published = {tensor.name for tensor in layout.official_parameters(self.config)}
        if not published.isdisjoint(tensor_names.match_names(left, published, with_prefix=False).values()):
            raise InputError(f"{self.directory} holds weights in the published layout: {convert}")
        say_unwrapped(self.directory, matched)
        self._stored = {canonical_name: name for name, canonical_name in matched.items()}
        self._shapes = {name: self._files.shapes[stored] for name, stored in self._stored.items()}
        self.names = [name for name in canonical if name in self._shapes]
        self.names += [name for name in self._shapes if name not in canonical]

    def shape(self, name):
        """Shape (tuple of int) of the tensor called `name`."""
        return self._shapes[name]

    def dtype(self, name):
        """Numpy dtype of the tensor called `name`: float32, float16 or bfloat16."""
        return dtypes.numpy_dtype(self._files.dtypes[self._stored[name]])

    def read(self, name, index=None):
        """The tensor called `name`, or its part ``[index]``, as a numpy array of its own dtype.

        Args:
            index: a tuple of slices (step 1), one for each of the leading axes; only that part is read.
        """
        return np.asarray(self._files.read(self._stored[name], index))

    def check(self, shapes):
        """Raise InputError, listing the names, unless the tensors are those of `shapes` (name → shape)."""
        tensor_names.check_tensors(self._shapes, shapes, self.directory)
        dtypes.check_dtypes(self._files.dtypes, self.directory)


def read_as(reader, name, dtype, index=None):
    """A tensor, or its part ``[index]``, in another dtype: converted a few rows at a time, so that it is in memory once.

    Args:
        reader: a `CheckpointReader`, or what has its interface; a quantised product comes as it is.
        name (str): the tensor's.
        dtype (str): "float32", "float16" or "bfloat16".
        index: as of `CheckpointReader.read`.

    Raises:
        InputError: as of `CheckpointReader.read` and `dtypes.cast`.
    """
    own, wanted = reader.dtype(name), dtypes.numpy_dtype(dtype)
    if own == wanted or not isinstance(own, np.dtype):
        return reader.read(name, index)
    rows, *others = index or (slice(None),)
    shape = reader.shape(name)
    first, last, _ = rows.indices(shape[0])
    step = max(PART // (own.itemsize * math.prod(shape[1:])), 1)
    result = None
    for row in range(first, last, step):
        part = dtypes.cast(reader.read(name, (slice(row, min(row + step, last)), *others)), dtype, name)
        if result is None:
            result = np.empty((last - first, *part.shape[1:]), wanted)
        result[row - first:row - first + len(part)] = part
    return result


def say_unwrapped(directory, matched):
    """Print a line where names were read without the prefixes of wrappers; ``matched`` is of `tensor_names.match_names`."""
    wrappers = tensor_names.describe_wrappers(matched)
    if wrappers:
        print(f"{directory}: names of tensors begin with {wrappers}, left by a wrapper of the model; read without it",
              file=sys.stderr, flush=True)
