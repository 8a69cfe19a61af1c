"""LoRA adapters as the peft package saves them, and checkpoints read with one added.

Hu et al., "LoRA" (arXiv:2106.09685): y = Wx + s·B(Ax) with s = alpha / r, or alpha / √r in rank-stabilised LoRA
(arXiv:2312.03732). A directory holds ``adapter_config.json`` and ``adapter_model.safetensors``, whose names are those of
the official torch model's modules.
"""

import math
import os
import re

import numpy as np

from telechat import fields
from telechat.checkpoint import layout
from telechat.checkpoint.reader import CheckpointReader
from telechat.checkpoint.safetensors_files import SafetensorsFiles
from telechat.errors import InputError
from telechat.quantization.checkpoint import QuantisedReader, is_quantised
from telechat.text_files import read_json_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What would change the result and is not supported, with the values that ask for nothing.
_PLAIN = {"bias": ("none",), "use_dora": (False,), "lora_bias": (False,), "modules_to_save": ([],), "use_qalora": (False,),
          "layer_replication": ([],), "trainable_token_indices": ([], {}), "target_parameters": ([],)}


class Adapter:
    """A LoRA adapter for a model.

    Args:
        directory (str): as peft saved it.
        config (TeleChatConfig): of the base model.

    Raises:
        InputError: a file is missing or broken, asks for what is not supported, or does not fit the model.
    """

    def __init__(self, directory, config):
        self.directory = os.fspath(directory)
        if not os.path.isfile(os.path.join(self.directory, CONFIG)):
            raise InputError(f"{self.directory} holds no {CONFIG}; give a directory that the peft package saved")
        self.settings = _read_settings(os.path.join(self.directory, CONFIG))
        self._files = SafetensorsFiles(self.directory, self._weight_files())
        stored = {_module(tensor.name): tensor for tensor in layout.official_parameters(config)}
        self._stored = {}  # module → StoredTensor, of those that the adapter changes
        for name in self._files.shapes:
            module, part = self._split(name)
            tensor = stored.get(module) or stored.get(module.removeprefix("transformer."))
            if tensor is None or len(tensor.shape) != 2:
                raise InputError(f"{self.directory} changes {module}, which the model does not have; give an adapter that "
                                 "was made for this model")
            self._stored[module] = tensor
            self._check_shape(name, part, module, tensor)
        if not self._stored:
            raise InputError(f"{self.directory} holds no lora_A and lora_B; give a directory that the peft package saved")
        self._modules = {}  # canonical name → modules that change it
        for module, tensor in self._stored.items():
            for parameter in tensor.parameters:
                self._modules.setdefault(parameter, []).append(module)

    def _weight_files(self):
        if os.path.isfile(os.path.join(self.directory, WEIGHTS)):
            return [WEIGHTS]
        raise InputError(f"{self.directory} holds no {WEIGHTS}; save the adapter in that format (peft does so by default)")

    def _split(self, name):
        """(module, "A" or "B") of a tensor's name."""
        found = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if not found:
            raise InputError(f"{self.directory} holds {name}, which is no lora_A or lora_B of a product; adapters of other "
                             "kinds are not supported: merge it with the peft package and give the merged model")
        return found[1], found[2]

    def _check_shape(self, name, part, module, tensor):
        """Refuse a tensor that does not fit the weight, or the adapter's rank."""
        outputs, inputs = tensor.shape[::-1] if self._is_transposed(tensor) else tensor.shape
        rank = self._pattern("rank_pattern", module, self.settings["r"])
        expected = (rank, inputs) if part == "A" else (outputs, rank)
        if self._files.shapes[name] != expected:
            raise InputError(f"{name} in {self.directory} is {self._files.shapes[name]} and must be {expected} for this model "
                             f"and rank {rank}; give an adapter that was made for this model")

    @staticmethod
    def _is_transposed(tensor):
        # 52B stores (in, out), which peft calls fan_in_fan_out.
        return ".attn.c_" in tensor.name or ".mlp.c_" in tensor.name

    def _pattern(self, name, module, default):
        for key, value in self.settings[name].items():
            if re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        return default

    def scale(self, module):
        """s of a module: what B·A is multiplied by."""
        rank = self._pattern("rank_pattern", module, self.settings["r"])
        alpha = self._pattern("alpha_pattern", module, self.settings["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.settings["use_rslora"] else rank)

    @property
    def parameters(self):
        """Canonical names of what the adapter changes, a set."""
        return set(self._modules)

    def delta(self, name):
        """What is added to the parameter of a canonical name: float32, its shape."""
        tensors = [self._stored[module] for module in self._modules[name]]
        products = {tensor.name: self._product(module) for module, tensor in zip(self._modules[name], tensors)}
        first = tensors[0]
        if first.partners:
            return first.combine(*(products.get(partner, np.zeros(first.shape, np.float32)) for partner in first.partners))
        return first.split(products[first.name])[first.parameters.index(name)]

    @property
    def modules(self):
        """Official names of what the adapter changes, a list."""
        return list(self._stored)

    def part(self, module, part):
        """A (rank, in) or B (out, rank) of a module, float32."""
        return self._files.read(self._name(module, part)).astype(np.float32)

    def factors(self, name):
        """A and B of what is added to the parameter of a canonical name, s in B: float32 (R, inputs) and (outputs, R).

        Where the model's layout has several modules in the place of one parameter, their ranks stand side by side in R.
        """
        modules = self._modules[name]
        first = self._stored[modules[0]]
        pairs = {self._stored[module].name: self._factors(module) for module in modules}
        if not first.partners:
            a, b = pairs[first.name]
            return a, np.ascontiguousarray(first.split(b.T if self._is_transposed(first) else b)[first.parameters.index(name)])
        shares, before, total = [], 0, sum(len(a) for a, _ in pairs.values())
        for partner in first.partners:
            share = np.zeros((first.shape[0], total), np.float32)
            if partner in pairs:
                rank = len(pairs[partner][0])
                share[:, before:before + rank] = pairs[partner][1]
                before += rank
            shares.append(share)
        return np.concatenate([pairs[partner][0] for partner in first.partners if partner in pairs]), first.combine(*shares)

    def rank(self, name):
        """R of `factors`, without reading them."""
        return sum(self._pattern("rank_pattern", module, self.settings["r"]) for module in self._modules[name])

    def _factors(self, module):
        a, b = (self.part(module, part) for part in "AB")
        return a, b * np.float32(self.scale(module))

    def _product(self, module):
        a, b = self._factors(module)
        return (b @ a).T if self._is_transposed(self._stored[module]) else b @ a

    def _name(self, module, part):
        names = (f"{PREFIX}{module}.lora_{part}{middle}.weight" for middle in ("", ".default"))
        found = next((name for name in names if name in self._files.shapes), None)
        if found is None:
            raise InputError(f"{self.directory} holds no lora_{part} of {module}; copy the adapter again")
        return found


class AdaptedReader:
    """A `CheckpointReader` whose tensors have an adapter added, in float32, and keep their dtype.

    Args:
        directory (str): the base model's.
        adapter (str): the adapter's.

    Raises:
        InputError: as of `CheckpointReader` and `Adapter`.
    """

    def __init__(self, directory, adapter):
        self._reader = CheckpointReader(directory)
        self.directory, self.config, self.names = self._reader.directory, self._reader.config, self._reader.names
        self.adapter = Adapter(adapter, self.config)
        self.shape, self.dtype, self.check = self._reader.shape, self._reader.dtype, self._reader.check

    def read(self, name, index=None):
        """As `CheckpointReader.read`."""
        part = self._reader.read(name, index)
        if name not in self.adapter.parameters:
            return part
        delta = self.adapter.delta(name)
        return (part.astype(np.float32) + (delta if index is None else delta[index])).astype(part.dtype)


def open_checkpoint(directory, lora=None):
    """The reader of a checkpoint directory, with the adapter of the directory ``lora`` added where there is one."""
    if is_quantised(directory):
        if lora is not None:
            raise InputError(f"{directory} holds quantised weights, to which the adapter {lora} cannot be added; give it with "
                             "the model in float16 or bfloat16")
        return QuantisedReader(directory)
    return CheckpointReader(directory) if lora is None else AdaptedReader(directory, lora)


def _module(name):
    return name.removesuffix(".weight")


def _read_settings(path):
    values = read_json_object(path, "copy the adapter again")
    try:
        kind = values.get("peft_type")
        if kind != "LORA":
            raise InputError(f"peft_type must be LORA, not {fields.shown(kind)}; merge it with the peft package instead")
        for name, plain in _PLAIN.items():
            if values.get(name) not in (None, *plain):
                raise InputError(f"{name} {fields.shown(values[name])} is not supported; merge it with the peft package "
                                 "and give the merged model")
        settings = {"r": fields.whole_number("r", values.get("r"), 1, 2 ** 16),
                    "lora_alpha": fields.real_number("lora_alpha", values.get("lora_alpha"), above=0),
                    "use_rslora": fields.flag("use_rslora", values.get("use_rslora"), False)}
        for name, read, bounds in (("rank_pattern", fields.whole_number, {"least": 1}),
                                   ("alpha_pattern", fields.real_number, {"above": 0})):
            given = values.get(name) or {}
            if not isinstance(given, dict):
                raise InputError(f"{name} must be an object, not {fields.shown(given)}")
            settings[name] = {_checked(key, name): read(f"{name}.{key}", value, **bounds) for key, value in given.items()}
        return settings
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _checked(pattern, name):
    try:
        re.compile(pattern)
    except re.error:
        raise InputError(f"{name} holds {fields.shown(pattern)}, which is no pattern of module names") from None
    return pattern
