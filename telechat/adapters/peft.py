"""LoRA adapters as the peft package saves them, and checkpoints read with one added.

Hu et al., "LoRA" (arXiv:2106.09685): y = Wx + s·B(Ax) with s = alpha / r, or alpha / √r in rank-stabilised LoRA
(arXiv:2312.03732). A directory holds ``adapter_config.json`` and ``adapter_model.safetensors``, whose names are those of
the official torch model's modules.
"""

import math
import os
import re

import numpy as np

from telechat.adapters.settings import read_settings
from telechat.checkpoint import layout
from telechat.checkpoint.dtypes import check_dtypes
from telechat.checkpoint.reader import CheckpointReader
from telechat.checkpoint.safetensors_files import SafetensorsFiles
from telechat.checkpoint.torch_files import TorchFiles
from telechat.errors import InputError
from telechat.quantization.checkpoint import QuantisedReader, is_quantised

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TORCH_WEIGHTS = "adapter_model.bin"  # as peft wrote them by default before 2024
# Of a tensor's name, behind `PREFIX`, which ms-swift's own tuners leave out: the module, the part, and what the adapter is called.
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.weight")
# What stands in the name of a tensor that was trained whole (modules_to_save, bias) and not in the model's.
_WRAPPED = [re.compile(rf"\.(base_layer|{saved})(?=\.)") for saved in (r"modules_to_save\.[^.]+", "modules_to_save")]
_UNUSED = ".original_module."  # in the name of what such a tensor stands in the place of
_DOUBLE = ("F64", "float64")  # read, too, and rounded
_EMBEDDING, _HEAD = "transformer.word_embeddings.weight", "lm_head.weight"


class Adapter:
    """A LoRA adapter for a model; some tensors may have been trained whole (modules_to_save, bias).

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
        self.settings = read_settings(os.path.join(self.directory, CONFIG))
        self._files = self._open()
        check_dtypes({name: dtype for name, dtype in self._files.dtypes.items() if dtype not in _DOUBLE}, self.directory)
        self._official = stored = {tensor.name: tensor for tensor in layout.official_parameters(config)}
        self._stored = {}  # module → StoredTensor, of those that have factors
        self._names = {}  # (module, "A" or "B") → name of a tensor in the file
        self._whole = {}  # canonical name → StoredTensor and name in the file of what was trained whole of it
        self._head = None  # name in the file of a head beside a tied embedding
        called = set()  # the adapter's name, where tensors have it
        for name in self._files.shapes:
            own = name.removeprefix(PREFIX)
            found = _FACTOR.fullmatch(own)
            if not found:
                if _UNUSED not in name:
                    self._add_whole(name, config)
                continue
            module, part, title = found.groups()
            tensor = _find(stored, f"{module}.weight")
            if tensor is None and f"{module}.weight" == _HEAD and config.tie_word_embeddings:
                raise InputError(f"{self.directory} changes {module} and not the embedding, which are one in this model "
                                 "(tie_word_embeddings); merge it with the peft package into a model whose head is its own")
            if tensor is None or len(tensor.shape) != 2:
                raise InputError(f"{self.directory} changes {module}, which the model does not have; give an adapter that "
                                 "was made for this model")
            self._stored[module], self._names[module, part] = tensor, name
            called.add(title)
            self._check_shape(name, part, module, tensor)
        if len(called) > 1:
            raise InputError(f"{self.directory} holds tensors of several adapters ({', '.join(sorted(map(str, called)))}); "
                             "save one of them alone")
        if not self._stored:
            raise InputError(f"{self.directory} holds no lora_A and lora_B; give a directory that the peft package saved")
        for module in self._stored:
            for part in "AB":
                if (module, part) not in self._names:
                    raise InputError(f"{self.directory} holds no lora_{part} of {module}; copy the adapter again")
        self._check_saved()
        if config.tie_word_embeddings:
            self._check_tied()
        self._modules = {}  # canonical name → modules that change it
        for module, tensor in self._stored.items():
            for parameter in tensor.parameters:
                self._modules.setdefault(parameter, []).append(module)

    def _open(self):
        """The tensors' file, whose name is `file`."""
        for self.file, kind in ((WEIGHTS, SafetensorsFiles), (TORCH_WEIGHTS, TorchFiles)):
            if os.path.isfile(os.path.join(self.directory, self.file)):
                return kind(self.directory, [self.file])
        raise InputError(f"{self.directory} holds no {WEIGHTS}; save the adapter in that format (peft does so by default)")

    def _add_whole(self, name, config):
        """Take a tensor that stands in the place of one of the model's."""
        plain = [wrapped.sub("", name.removeprefix(PREFIX)) for wrapped in _WRAPPED]
        if _HEAD in plain and config.tie_word_embeddings:
            self._head = name
            return
        tensor = next(filter(None, (_find(self._official, own) for own in plain)), None)
        if tensor is None or "lora_" in name:
            raise InputError(f"{self.directory} holds {name}, which is no lora_A or lora_B of a product and no tensor of this "
                             "model; adapters of other kinds are not supported: merge it with the peft package and give the "
                             "merged model")
        if self._files.shapes[name] != tensor.shape:
            raise InputError(f"{name} in {self.directory} is {self._files.shapes[name]} and must be {tensor.shape} for this "
                             "model; give an adapter that was made for this model")
        for parameter in tensor.parameters:
            self._whole.setdefault(parameter, []).append((tensor, name))

    def _check_saved(self):
        """Refuse where weights are missing of the modules whose names end as modules_to_save says, as peft finds them.

        It may say names that the model does not have, for which peft looks in vain, too.
        """
        held = {tensor.name for tensors in self._whole.values() for tensor, _ in tensors}
        for name in self._official:
            parents = name.split(".")[:-1]
            modules = [".".join(parents[:end]) for end in range(1, len(parents) + 1)]
            said = [end for end in self.settings["modules_to_save"] if any(module.endswith(end) for module in modules)]
            if said and name not in held:
                raise InputError(f"{self.directory} holds no {name}, and its modules_to_save names {said[0]}; copy the adapter "
                                 "again")

    def _check_tied(self):
        """Refuse an embedding that the head, which is the same tensor in this model, is not to share, or the other way round."""
        own = self._whole.get(_EMBEDDING)
        both = own is not None and self._head is not None
        if both and not np.array_equal(self._files.read(own[-1][1]), self._files.read(self._head)) or (
                not both and (self._head is not None or own is not None and not self.settings["ensure_weight_tying"])):
            raise InputError(f"{self.directory} holds {'a head' if own is None else 'an embedding'} of its own, and this model's "
                             "embedding and head are one (tie_word_embeddings); merge it with the peft package into a model "
                             "whose head is its own")

    def _check_shape(self, name, part, module, tensor):
        """Refuse a tensor that does not fit the weight, or the adapter's rank."""
        outputs, inputs = tensor.shape[::-1] if self._is_transposed(tensor) else tensor.shape
        rank = self.rank_of(module)
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

    def rank_of(self, module):
        """r of a module."""
        return self._pattern("rank_pattern", module, self.settings["r"])

    def alpha_of(self, module):
        """alpha of a module."""
        return self._pattern("alpha_pattern", module, self.settings["lora_alpha"])

    def scale(self, module):
        """s of a module: what B·A is multiplied by."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.settings["use_rslora"] else rank)

    @property
    def parameters(self):
        """Canonical names of what the adapter changes, a set."""
        return {*self._modules, *self._whole}

    @property
    def trained_whole(self):
        """Canonical names of those that were trained whole."""
        return set(self._whole)

    def change(self, name, value):
        """The parameter of a canonical name with this adapter: float32, from ``value``, the base model's."""
        value = value.astype(np.float32)
        for tensor, file in self._whole.get(name, ()):
            whole = tensor.split(self._files.read(file).astype(np.float32))[tensor.parameters.index(name)]
            if tensor.partners:  # the others' shares stay as they are
                whole = tensor.combine(*(whole if partner == tensor.name else self._official[partner].join(value)
                                         for partner in tensor.partners))
            value = whole
        return value + self.delta(name) if name in self._modules else value

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
        return self._files.read(self._names[module, part]).astype(np.float32)

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

    @property
    def largest_rank(self):
        """The largest `rank`."""
        return max(map(self.rank, self._modules))

    def rank(self, name):
        """R of `factors`, without reading them."""
        return sum(map(self.rank_of, self._modules[name]))

    def _factors(self, module):
        a, b = (self.part(module, part) for part in "AB")
        return a, b * np.float32(self.scale(module))

    def _product(self, module):
        a, b = self._factors(module)
        return (b @ a).T if self._is_transposed(self._stored[module]) else b @ a


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
        if name not in self.adapter.parameters:
            return self._reader.read(name, index)
        if name in self.adapter.trained_whole:
            whole = self.adapter.change(name, self._reader.read(name)).astype(self._reader.dtype(name))
            return whole if index is None else whole[index]
        part, delta = self._reader.read(name, index), self.adapter.delta(name)
        return (part.astype(np.float32) + (delta if index is None else delta[index])).astype(part.dtype)


def open_checkpoint(directory, lora=None):
    """(reader of a checkpoint directory, `Adapter` that is to stay beside its weights or None).

    The adapter of the directory ``lora`` is added to the weights that are read; to quantised ones it cannot be, and is
    to be put beside them (attached.py).
    """
    if is_quantised(directory):
        reader = QuantisedReader(directory)
        return reader, None if lora is None else Adapter(lora, reader.config)
    return CheckpointReader(directory) if lora is None else AdaptedReader(directory, lora), None


def _find(stored, name):
    """The tensor of the official torch model's name; 7B's files leave out what its modules begin with. None for none."""
    return stored.get(name) or stored.get(name.removeprefix("transformer."))
