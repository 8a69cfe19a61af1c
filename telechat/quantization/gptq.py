"""The layout in which AutoGPTQ stores quantised weights (GPTQ: Frantar et al., arXiv:2210.17323), read and written.

A quantised product has ``qweight`` (in / n, out) and ``qzeros`` (groups, out / n), int32 with n = 32 / bits values each,
the lowest bits first; ``scales`` (groups, out); and, mostly, ``g_idx`` (in), the group of each input:
W[o, i] = scales[g(i), o] · (q[i, o] − z[g(i), o]), with z one more than what is stored.
"""

import dataclasses
import math
import os
import re

import numpy as np

from telechat import fields
from telechat.checkpoint.dtypes import cast
from telechat.checkpoint.safetensors_files import SafetensorsFiles
from telechat.checkpoint.torch_files import TorchFiles
from telechat.errors import InputError
from telechat.nn.quantised import SMALLEST_GROUP, QuantisedWeight
from telechat.text_files import read_json_object

_FILE = re.compile(r"(gptq_model-(\d)bit-(-?\d+)g|model|pytorch_model)([_-]\d+-of-\d+)?\.(bin|safetensors)")
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
KEY = "quantization_config"  # in config.json


def quantisation_settings(directory):
    """The settings of a directory of GPTQ weights, "bits" and "group_size" checked; None where it holds none.

    Raises:
        InputError: they are quantised in another way, or not as AutoGPTQ does.
    """
    path = os.path.join(directory, "quantize_config.json")
    if os.path.isfile(path):
        values = read_json_object(path, "download it again")
    else:
        path = os.path.join(directory, "config.json")
        values = read_json_object(path, "download it again").get(KEY) if os.path.isfile(path) else None
        if not isinstance(values, dict) or values.get("quant_method") != "gptq":
            return None
    return checked_settings(path, values)


def checked_settings(path, values):
    """The settings ``values`` (dict) of the file ``path`` with "bits" and "group_size" checked; InputError as above."""
    try:
        bits = fields.whole_number("bits", values.get("bits"), 2, 8)
        group = fields.whole_number("group_size", values.get("group_size"), -1)
        if group == 0:
            raise InputError("group_size must be -1, for one group a row, or at least 1, not 0")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if bits not in (4, 8):
        raise InputError(f"{path}: bits must be 4 or 8, not {bits}; give the model in one of these, or not quantised")
    if values.get("checkpoint_format") == "gptq_v2":
        raise InputError(f'{path}: checkpoint_format "gptq_v2" is not supported; save the model in the format "gptq"')
    return {**values, "quant_method": "gptq", "bits": bits, "group_size": group}


@dataclasses.dataclass(frozen=True)
class Product:
    """A quantised product as it is stored, its values unpacked.

    Attributes:
        values (array): uint8 (in, out), q of this module's docstring.
        zeros, scales (array): int16 and float (groups, out), z and scales.
        groups (array): int32 (in,), the group of each input.
    """

    values: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    groups: np.ndarray

    def dequantised(self):
        """The weight, float32 (out, in)."""
        values, zeros = self.values.astype(np.float32), self.zeros.astype(np.float32)
        return np.ascontiguousarray((self.scales.astype(np.float32)[self.groups] * (values - zeros[self.groups])).T)

    def of_outputs(self, change):
        """Products of some outputs each: ``change`` takes an array (out, …) and gives some of its rows, as a tuple."""
        parts = zip(*(change(array.T) for array in (self.values, self.zeros, self.scales)))
        return [Product(*(np.ascontiguousarray(array.T) for array in part), self.groups) for part in parts]

    def tensors(self, bits):
        """(part of the name, array) of each tensor that is stored."""
        yield "qweight", pack(self.values, bits, 0)
        yield "qzeros", pack(self.zeros - 1, bits, 1)
        yield "scales", self.scales
        yield "g_idx", self.groups

    def weight(self, bits, name, part=None):
        """What computes: a `QuantisedWeight` of the outputs and inputs ``part``, a pair of slices; None: of all.

        Raises:
            InputError: it is not symmetric, or groups are smaller or in another order than can be computed with.
        """
        outputs, inputs = part or (slice(None), slice(None))
        if np.any(self.zeros != 2 ** (bits - 1)):
            raise InputError(f"{name} is quantised asymmetrically, which can only be read with tools/convert.py torch-to-ms "
                             "--dequantize")
        groups, order = self.groups, None
        if np.any(np.diff(groups) < 0):
            if part is not None:
                raise InputError(f"{name} is quantised with act-order (desc_act), which tensor parallelism cannot cut; train "
                                 "with parallel.tensor 1, answer with one process, or give a model without it")
            order = np.argsort(groups, kind="stable").astype(np.int32)
            groups = groups[order]
        groups, values = groups[inputs], self.values if order is None else self.values[order]
        size = math.gcd(len(groups), *(np.flatnonzero(np.diff(groups)) + 1).tolist())
        if size % SMALLEST_GROUP:
            raise InputError(f"{name}: parts of a group of {size} inputs are too small, they must be a multiple of "
                             f"{SMALLEST_GROUP}; use fewer processes, or a group_size that is one")
        values = (values[inputs, outputs].astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
        scales = self.scales[groups[::size]][:, outputs].astype(np.float32)
        return QuantisedWeight(bits, np.ascontiguousarray(values.T), np.ascontiguousarray(scales.T), order)


def together(products, combine, name):
    """One product of several that have the same inputs; ``combine`` puts arrays (out, …) of theirs together.

    Raises InputError where their inputs lie in different groups.
    """
    first = products[0]
    if any(not np.array_equal(first.groups, other.groups) for other in products):
        raise InputError(f"the parts of {name} have their inputs in different groups, so that they cannot be one product; "
                         "give --dequantize")
    parts = (combine(*(getattr(product, field).T for product in products)).T for field in ("values", "zeros", "scales"))
    return Product(*map(np.ascontiguousarray, parts), first.groups)


class GptqFiles:
    """The weights of a directory of GPTQ as ordinary ones, with the interface of `SafetensorsFiles`.

    A product is computed when it is read, in float32, and given in the dtype of its scales.

    Args:
        directory (str): theirs.
        settings (dict): of `quantisation_settings`.
        biases (set of str): names of biases that the model has; AutoGPTQ writes one, of zeros, for the others too.
        transposed (bool): ordinary weights of this layout are (in, out), as 52B's are.

    Raises:
        InputError: there is no file, a tensor of a product is missing or has a wrong shape, or a bias that the model does
            not have is not zero.
    """

    def __init__(self, directory, settings, biases, transposed=False):
        names = sorted(name for name in os.listdir(directory) if _FILE.fullmatch(name))
        safe = [name for name in names if name.endswith(".safetensors")]
        if not names:
            raise InputError(f"{directory} holds no gptq_model-…bit-…g.bin or .safetensors; download it again")
        self.directory, self.bits, self.transposed = directory, settings["bits"], transposed
        self._group_size = max(settings["group_size"], 0) or None  # None: all inputs are one group
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
                both = shape[1], shape[0] * 32 // self.bits
                self.shapes[f"{module}.weight"] = both[::-1] if transposed else both
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

    def is_quantised(self, name):
        """Whether the weight called ``name`` is a quantised product's."""
        return name.endswith(".weight") and name.removesuffix(".weight") in self._products

    def product(self, name):
        """The `Product` of a quantised weight."""
        module = name.removesuffix(".weight")
        return unpacked(self.bits, *(self._files.read(f"{module}.{part}") if f"{module}.{part}" in self._files.shapes else None
                                     for part in _PARTS), self._group_size)

    def read(self, name, index=None):
        """The tensor called ``name``, or only its part ``[index]`` (a tuple of slices), as a numpy array."""
        if not self.is_quantised(name):
            return self._files.read(name) if index is None else self._files.read(name, index)
        weight = self.product(name).dequantised()
        weight = cast(weight.T if self.transposed else weight, self.dtypes[name], name)
        return weight if index is None else weight[index]

    def names(self, file):
        """Names of one of `files`; products come with the file of their ``qweight``."""
        for name in self._files.names(file):
            module, _, part = name.rpartition(".")
            if module in self._products and part == "qweight":
                name = f"{module}.weight"
            if name in self.shapes:
                yield name

    def tensors(self, file):
        """Iterate over (name, array) of one of `files`."""
        for name in self.names(file):
            yield name, self.read(name)


def unpack(words, bits, axis):
    """int32 words → their values, unsigned, the lowest bits first along ``axis``."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    words = np.moveaxis(words.view(np.uint32), axis, -1)
    values = (words[..., None] >> shifts) & np.uint32(2 ** bits - 1)
    return np.moveaxis(values.reshape(*words.shape[:-1], -1), -1, axis)


def pack(values, bits, axis):
    """The inverse of `unpack`: whole numbers below 2^bits → int32 words."""
    count = 32 // bits
    values = np.moveaxis(np.asarray(values).astype(np.uint32), axis, -1)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    words = (values.reshape(*values.shape[:-1], -1, count) << shifts).sum(-1, dtype=np.uint32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


def unpacked(bits, qweight, qzeros, scales, g_idx=None, group_size=None):
    """The `Product` of tensors as this module's docstring has them; ``group_size`` is asked for where g_idx is None."""
    values = unpack(qweight, bits, 0).astype(np.uint8)
    zeros = unpack(qzeros, bits, 1).astype(np.int16) + 1
    if g_idx is None:
        g_idx = np.arange(len(values)) // (group_size or -(-len(values) // len(scales)))  # the last may be a smaller one
    return Product(values, zeros, scales, g_idx.astype(np.int32))


def dequantise(bits, qweight, qzeros, scales, g_idx=None):
    """The product's weight, float32 (out, in), from its tensors as this module's docstring has them."""
    return unpacked(bits, qweight, qzeros, scales, g_idx).dequantised()
