"""Checkpoints of ours whose products are quantised: read, and converted from published ones.

They are ordinary ones but for the quantised products: in the place of ``….query.weight`` there are ``….query.qweight``,
``.qzeros``, ``.scales`` and ``.g_idx`` as AutoGPTQ has them (gptq.py), and ``config.json`` holds ``quantization_config``.
"""

import dataclasses
import os
import shlex

import numpy as np

from telechat.checkpoint import layout, tensor_names
from telechat.checkpoint.dtypes import check_dtypes
from telechat.checkpoint.products import is_product
from telechat.checkpoint.reader import CheckpointReader
from telechat.checkpoint.safetensors_files import is_weight_file
from telechat.config import TeleChatConfig
from telechat.errors import InputError
from telechat.quantization.gptq import KEY, GptqFiles, checked_settings, quantisation_settings, together


def is_quantised(directory):
    """Whether a directory's ``config.json`` says that its weights are quantised by GPTQ."""
    return os.path.isfile(os.path.join(directory, "config.json")) and quantisation_settings(directory) is not None


class QuantisedReader:
    """A directory of ours with quantised products, with the interface of `CheckpointReader`.

    `read` gives a `QuantisedWeight` for them, and `dtype` what they are in words.

    Args:
        directory (str): its path.

    Raises:
        InputError: files are missing or broken, or the weights are in a published layout.
    """

    def __init__(self, directory):
        self.directory = os.fspath(directory)
        config = TeleChatConfig.from_pretrained(self.directory, quantised=True)
        self.settings = quantisation_settings(self.directory)
        if "quantize_config.json" in os.listdir(self.directory) or not any(map(is_weight_file, os.listdir(self.directory))):
            raise InputError(f"{self.directory} holds weights as AutoGPTQ wrote them: run `python tools/convert.py torch-to-ms "
                             f"--torch_path {shlex.quote(self.directory)} --mindspore_path DIR` and give that DIR")
        self._reader = CheckpointReader(self.directory, quantised=True)
        biases = {name for name in layout.parameter_shapes(config) if name.endswith(".bias")}
        self._files = GptqFiles(self.directory, self.settings, biases)
        self.config = config
        self.names = [name for name in layout.parameter_shapes(config) if name in self._files.shapes]

    def check(self, shapes):
        """As `CheckpointReader.check`; InputError too where something else than a block's product is quantised."""
        tensor_names.check_tensors(self._files.shapes, shapes, self.directory)
        check_dtypes(self._files.dtypes, self.directory)
        for name in self.names:
            if self._files.is_quantised(name) and not is_product(name):
                raise InputError(f"{name} in {self.directory} is quantised, which only products within blocks can be; "
                                 "give --dequantize to tools/convert.py torch-to-ms")

    def shape(self, name):
        """Shape of a parameter, of quantised ones too."""
        return self._files.shapes[name]

    def dtype(self, name):
        """Numpy dtype of a parameter, or text for a quantised one."""
        return f"int{self.settings['bits']}" if self._files.is_quantised(name) else self._reader.dtype(name)

    def read(self, name, index=None):
        """The parameter of this name, or its part ``[index]`` (a slice an axis): an array or a `QuantisedWeight`."""
        if not self._files.is_quantised(name):
            return self._reader.read(name, index)
        whole = index is None or all(part.indices(size) == (0, size, 1) for part, size in zip(index, self.shape(name)))
        return self._files.product(name).weight(self.settings["bits"], name, None if whole else index)


def quantised_shapes(shapes, quantised, bits, group_size):
    """Name → shape of what is stored, where the weights ``quantised`` of the parameters ``shapes`` are products of GPTQ."""
    stored = {}
    for name, shape in shapes.items():
        if name not in quantised:
            stored[name] = shape
            continue
        (outputs, inputs), module = shape, name.removesuffix(".weight")
        groups = 1 if group_size == -1 else -(-inputs // group_size)
        stored[f"{module}.qweight"] = inputs * bits // 32, outputs
        stored[f"{module}.qzeros"] = groups, outputs * bits // 32
        stored[f"{module}.scales"] = groups, outputs
        stored[f"{module}.g_idx"] = (inputs,)
    return stored


def stored_tensors(name, product, bits):
    """(name, array) of the tensors of a `Product` in the place of the weight ``name``."""
    module = name.removesuffix(".weight")
    for part, array in product.tensors(bits):
        yield f"{module}.{part}", array


def canonical_products(tensor, product, transposed, waiting):
    """(canonical name, `Product`) of each parameter that ``product``, the StoredTensor ``tensor`` of a layout, completes.

    Args:
        transposed (bool): ordinary weights of the layout are (in, out).
        waiting (dict): products read so far whose partners were not.
    """
    if tensor.partners:
        waiting[tensor.name] = product
        if all(name in waiting for name in tensor.partners):
            parts = [waiting.pop(name) for name in tensor.partners]
            yield tensor.parameters[0], together(parts, tensor.combine, tensor.parameters[0])
        return
    parts = product.of_outputs(lambda array: tensor.split(array.T if transposed else array))
    yield from zip(tensor.parameters, parts)


def with_settings(config, settings):
    """The config of a model with quantised products; settings None: of one without."""
    extra = {key: value for key, value in config.extra.items() if key != KEY}
    if settings is not None:
        extra[KEY] = settings
    return dataclasses.replace(config, extra=extra)


def settings_of(config):
    """``quantization_config`` of a config, checked, or None."""
    settings = config.extra.get(KEY)
    return checked_settings(f"config.json: {KEY}", settings) if isinstance(settings, dict) else None


def product_bytes(shape, settings, scale=np.dtype(np.float32).itemsize):
    """Bytes of a quantised product in memory: its values, and a scale of so many bytes for each group."""
    outputs, inputs = shape
    group = inputs if settings["group_size"] == -1 else settings["group_size"]
    return outputs * inputs * settings["bits"] // 8 + outputs * -(-inputs // group) * scale
