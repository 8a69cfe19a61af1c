"""Weights quantised by AutoGPTQ (GPTQ: Frantar et al., arXiv:2210.17323), read back as ordinary ones.

A quantised product has ``qweight`` (in / n, out) and ``qzeros`` (groups, out / n), int32 with n = 32 / bits values each,
the lowest bits first; ``scales`` (groups, out); and, mostly, ``g_idx`` (in), the group of each input:
W[o, i] = scales[g(i), o] · (q[i, o] − z[g(i), o]), with z one more than what is stored.
"""

import os
import re

import numpy as np

from telechat import fields
from telechat.checkpoint.dtypes import cast
from telechat.checkpoint.safetensors_files import SafetensorsFiles
from telechat.checkpoint.torch_files import TorchFiles
from telechat.errors import InputError
from telechat.text_files import read_json_object

_FILE = re.compile(r"(gptq_model-(\d)bit-(-?\d+)g|model|pytorch_model)([_-]\d+-of-\d+)?\.(bin|safetensors)")
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def quantisation_settings(directory):
    """{"bits", "group_size"} of a directory of GPTQ weights; None where it holds none.

    Raises:
        InputError: they are quantised in another way, or not as AutoGPTQ does.
    """
    path = os.path.join(directory, "quantize_config.json")
    if os.path.isfile(path):
        values = read_json_object(path, "download it again")
    else:
        path = os.path.join(directory, "config.json")
        values = read_json_object(path, "download it again").get("quantization_config") if os.path.isfile(path) else None
        if not isinstance(values, dict) or values.get("quant_method") != "gptq":
            return None
    try:
        bits = fields.whole_number("bits", values.get("bits"), 2, 8)
        group = fields.whole_number("group_size", values.get("group_size"), -1)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if bits not in (4, 8):
        raise InputError(f"{path}: bits must be 4 or 8, not {bits}; give the model in one of these, or not quantised")
    return {"bits": bits, "group_size": group}


class DequantisedFiles:
    """The weights of a directory of GPTQ as ordinary ones, with the interface of `SafetensorsFiles`.

    A product is computed when it is read, in float32, and given in the dtype of its scales.

    Args:
        directory (str): theirs.
        settings (dict): of `quantisation_settings`.
        biases (set of str): names of biases that the model has; AutoGPTQ writes one, of zeros, for the others too.

    Raises:
        InputError: there is no file, a tensor of a product is missing or has a wrong shape, or a bias that the model does
            not have is not zero.
    """

    def __init__(self, directory, settings, biases):
        names = sorted(name for name in os.listdir(directory) if _FILE.fullmatch(name))
        safe = [name for name in names if name.endswith(".safetensors")]
        if not names:
            raise InputError(f"{directory} holds no gptq_model-…bit-…g.bin or .safetensors; download it again")
        self.directory, self.bits = directory, settings["bits"]
        self._files = SafetensorsFiles(directory, safe) if safe else TorchFiles(directory, names)
        self.files = self._files.files
        found = self._files.shapes
        self._products = {name.removesuffix(".qweight") for name in found if name.endswith(".qweight")}
        self.shapes, self.dtypes = {}, {}
        for name, shape in found.items():
            module, _, part = name.rpartition(".")
            if module not in self._products:
                self.shapes[name], self.dtypes[name] = shape, self._files.dtypes[name]
            elif part == "qweight":
                self._check(module)
                self.shapes[f"{module}.weight"] = shape[1], shape[0] * 32 // self.bits
                self.dtypes[f"{module}.weight"] = self._files.dtypes[f"{module}.scales"]
            elif part == "bias" and name in biases:
                self.shapes[name], self.dtypes[name] = shape, self._files.dtypes[name]
            elif part == "bias" and np.any(self._files.read(name)):
                raise InputError(f"{name} in {directory} is not zero, and the model has no such bias; check config.json")

    def _check(self, module):
        shapes = self._files.shapes
        for part in _PARTS[:3]:
            if f"{module}.{part}" not in shapes:
                raise InputError(f"{self.directory} lacks {module}.{part}; download it again")
        rows, outputs = shapes[f"{module}.qweight"]
        groups, inputs = shapes[f"{module}.scales"][0], rows * 32 // self.bits
        expected = {"qzeros": (groups, outputs * self.bits // 32), "scales": (groups, outputs), "g_idx": (inputs,)}
        for part, shape in expected.items():
            given = shapes.get(f"{module}.{part}", shape)
            if given != shape:
                raise InputError(f"{module}.{part} in {self.directory} is {given} and must be {shape} for {self.bits} bits; "
                                 "check quantize_config.json")

    def read(self, name):
        """The tensor called ``name`` as a numpy array."""
        module = name.removesuffix(".weight")
        if module not in self._products or not name.endswith(".weight"):
            return self._files.read(name)
        parts = {part: self._files.read(f"{module}.{part}") for part in _PARTS if f"{module}.{part}" in self._files.shapes}
        return cast(dequantise(self.bits, **parts), self.dtypes[name], name)

    def tensors(self, file):
        """Iterate over (name, array) of one of `files`; products come with the file of their ``qweight``."""
        for name in self._files.names(file):
            module, _, part = name.rpartition(".")
            if module in self._products and part == "qweight":
                name = f"{module}.weight"
            if name in self.shapes:
                yield name, self.read(name)


def unpack(words, bits, axis):
    """int32 words → their values, unsigned, the lowest bits first along ``axis``."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    words = np.moveaxis(words.view(np.uint32), axis, -1)
    values = (words[..., None] >> shifts) & np.uint32(2 ** bits - 1)
    return np.moveaxis(values.reshape(*words.shape[:-1], -1), -1, axis)


def dequantise(bits, qweight, qzeros, scales, g_idx=None):
    """The product's weight, float32 (out, in), from its tensors as this module's docstring has them."""
    values = unpack(qweight, bits, 0).astype(np.float32)
    zeros = unpack(qzeros, bits, 1).astype(np.float32) + 1
    if g_idx is None:
        g_idx = np.arange(len(values)) // -(-len(values) // len(scales))
    return np.ascontiguousarray((scales.astype(np.float32)[g_idx] * (values - zeros[g_idx])).T)
