"""Reading and writing torch's ``pytorch_model*.bin``; the only file that imports torch."""

import os
import re

import numpy as np

from telechat.checkpoint import dtypes
from telechat.checkpoint.safetensors_files import indexed_files
from telechat.errors import InputError
from telechat.text_files import refuse_placeholder_file

INDEX = "pytorch_model.bin.index.json"
# Published with either separator before the shard's number.
_WEIGHTS = re.compile(r"pytorch_model([_-]\d+-of-\d+)?\.bin")


def is_weight_file(name):
    """Whether a file of this name is part of a torch checkpoint, its index included."""
    return name == INDEX or _WEIGHTS.fullmatch(name) is not None


def torch_weight_files(directory):
    """Names, sorted, of the weight files of `directory`: those its index lists, where it has one.

    Raises:
        InputError: the index is broken or lists a file that is not there.
    """
    index = os.path.join(directory, INDEX)
    if os.path.isfile(index):
        return indexed_files(index)
    return sorted(filter(_WEIGHTS.fullmatch, os.listdir(directory)))


def import_torch():
    """The torch module.

    Raises:
        InputError: it is not installed.
    """
    try:
        import torch
    except ImportError:
        raise InputError("converting from or to torch needs torch: pip install torch, "
                         "or install telechat with its extra `convert`") from None
    return torch


class TorchFiles:
    """The tensors of a directory's .bin files, with the interface of SafetensorsFiles.

    Files in torch's zip format are mapped into memory and cost none; one in the older format is
    read whole while its tensors are taken.

    Args:
        directory: their directory.
        files: names of other files there to read instead; None.

    Raises:
        InputError: a file is broken, is no dictionary of tensors, or two hold the same tensor.
    """

    def __init__(self, directory, files=None):
        self.directory = os.fspath(directory)
        self.files = torch_weight_files(self.directory) if files is None else files
        self.shapes, self.dtypes, self._file_of = {}, {}, {}
        for file in self.files:
            for name, tensor in self._load(file, shapes_only=True).items():
                if name in self.shapes:
                    raise InputError(f"{name} is in both {self._file_of[name]} and {file} of "
                                     f"{self.directory}; remove the file that does not belong there")
                self.shapes[name] = tuple(tensor.shape)
                self.dtypes[name] = str(tensor.dtype).rpartition(".")[2]
                self._file_of[name] = file

    def _load(self, file, shapes_only=False):
        torch = import_torch()
        path = os.path.join(self.directory, file)
        refuse_placeholder_file(path)
        try:
            with open(path, "rb") as opened:
                mapped = opened.read(2) == b"PK"  # a zip file
            # Without mmap, "meta" skips the values: only names, shapes and dtypes are wanted.
            tensors = torch.load(path, mmap=mapped, weights_only=True,
                                 map_location="meta" if shapes_only and not mapped else "cpu")
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror or error})") from None
        except Exception as error:  # torch raises many kinds for a broken file
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            if "weights" in reason.lower():  # torch's advice to switch its protection off, which runs whatever is in the file
                reason = "it holds something else than tensors, or is no torch file at all"
            raise InputError(f"{path} is not a whole torch file of plain tensors ({reason}); "
                             "copy or download it again") from None
        values = tensors.values() if isinstance(tensors, dict) else [None]
        if not all(isinstance(value, torch.Tensor) for value in values):
            raise InputError(f"{path} must hold a dictionary of tensors by name and nothing else")
        return tensors

    def read(self, name):
        """The tensor called `name` as a numpy array."""
        return to_numpy(self._load(self._file_of[name])[name])

    def names(self, file):
        """Names of the tensors in one of `files`."""
        return [name for name, owner in self._file_of.items() if owner == file]

    def tensors(self, file):
        """Iterate over (name, array) of one of `files`."""
        loaded = self._load(file)
        for name in list(loaded):
            yield name, to_numpy(loaded.pop(name))


def to_numpy(tensor):
    """A torch tensor as a numpy array that shares its memory; bfloat16 becomes numpy's."""
    torch = import_torch()
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(dtypes.numpy_dtype("bfloat16"))
    return tensor.numpy()


def to_torch(array):
    """A numpy array as a torch tensor, sharing its memory where it is contiguous."""
    torch = import_torch()
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def shard_names(count, separator):
    """File names of `count` shards: ``pytorch_model_00001-of-00003.bin`` and so on."""
    return [f"pytorch_model{separator}{number:05d}-of-{count:05d}.bin" for number in range(1, count + 1)]


def save(path, tensors):
    """Write `tensors` (name → numpy array) as a file that ``torch.load(weights_only=True)`` reads.

    Raises:
        OSError: the file cannot be written.
    """
    torch = import_torch()
    try:
        with open(path, "wb") as file:
            torch.save({name: to_torch(array) for name, array in tensors.items()}, file)
    except RuntimeError as error:
        # torch reports what its writer was left with; the reason is what it met on the way.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
