"""TrainedAdapter: the tensors of a LoRA adapter that one process trains, beside a stage of frozen weights."""

import math
import zlib

import mindspore as ms
import numpy as np

from telechat.adapters.modules import layer_prefix, lora_names, lora_shapes, modules_of, products_of, split_b
from telechat.nn.device import device_parameter
from telechat.nn.lora import ATTENTION, FEED_FORWARD
from telechat.parallel.plan import local_slices


class TrainedAdapter:
    """A and B of the layers held here, float32, under canonical names; in the place of a `Stage` to the optimizer.

    What a column-parallel product is given is whole on every tensor-parallel rank and its outputs are cut, so A is whole
    and B cut along its rows; of a row-parallel one A is cut along its columns and B whole (plan.py).

    Args:
        config (TeleChatConfig): of the whole model.
        lora (LoraConfig): the adapter.
        layers (range): held here.
        read (callable): ``read(name, slices)`` → float32 array of that part of a tensor of `lora_shapes`.
        tensor (Group): the tensor-parallel ranks; None: one.

    Attributes:
        parameters (dict): canonical name → Parameter.
        slices (dict): canonical name → the part of the whole tensor held here.
        products (list of str): what has an adapter, of `telechat.nn.lora.PRODUCTS`.
        kernels (Kernels): what computes; set by who trains.
        dropouts (list): for both halves of a block, of each mask of dropout: the product whose stream it is drawn from, its
            inputs, and the columns here. The products of one module share a mask, as they do in the official model.
    """

    def __init__(self, config, lora, layers, read, tensor=None):
        self.config, self.lora, self.layers = config, lora, layers
        self.modules = modules_of(config, lora.targets)
        self.products = products_of(self.modules)
        self.kernels = None
        rank, size = (0, 1) if tensor is None else (tensor.rank, tensor.size)
        self.shapes = lora_shapes(config, lora)
        self.parameters, self.slices = {}, {}
        self._names = []  # of each layer's tensors, as they are updated together
        self._rows = []  # of each layer, for both halves of a block: names of A and B of each product
        self._pairs = {}  # layer and product → names of A and B
        for layer in layers:
            pairs, names = {}, []
            for module in self.modules:
                a, bs = lora_names(layer, module)
                names += [a, *bs]
                pairs.update((product, (a, b)) for product, b in zip(module.products, bs))
            for name in names:
                self.slices[name] = local_slices(name, self.shapes[name], rank, size)
                self.parameters[name] = device_parameter(read(name, self.slices[name]), ms.float32, name)
            self._names.append(names)
            self._pairs.update(((layer, product), pair) for product, pair in pairs.items())
            self._rows.append([[name for product in half if product in pairs for name in pairs[product]]
                               for half in (ATTENTION, FEED_FORWARD)])
        self.dropouts = self._dropouts()

    def groups(self):
        """As `Stage.groups`: nothing of the embedding, each layer's, nothing of the head."""
        return [[], *self._names, []]

    def tensors(self, index):
        """A and B of the ``index``-th layer here, as graphs take them: a row for each half of the block."""
        return [[self.parameters[name].data for name in row] for row in self._rows[index]]

    def pair(self, layer, product):
        """A and B of one product of a layer of the model, Parameters."""
        return [self.parameters[name] for name in self._pairs[layer, product]]

    def gradients(self, index, gradients):
        """From those of both rows one behind the other to those of the layer's tensors, in their order.

        The A of several products has as many gradients, which are added up.
        """
        sums = {}
        for name, gradient in zip([name for row in self._rows[index] for name in row], gradients):
            sums[name] = sums[name] + gradient if name in sums else gradient
        return [sums[name] for name in self._names[index]]

    def _dropouts(self):
        places = {}
        for module in self.modules:
            name = lora_names(self.layers[0], module)[0]
            place = module.products[0], self.shapes[name][1], self.slices[name][1]
            places.update(dict.fromkeys(module.products, place))
        return [[places[product] for product in half if product in places] for half in (ATTENTION, FEED_FORWARD)]


def initial_tensor(lora, seed, name, shape):
    """A new tensor of an adapter, float32, as peft begins: A uniform within ±1/√inputs, B zero.

    That is kaiming_uniform with a = √5 (arXiv:1502.01852). A function of seed and name, so that any process can make it.
    """
    if ".lora_B." in name:
        return np.zeros(shape, np.float32)
    bound = 1 / math.sqrt(shape[1])
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).uniform(-bound, bound, shape).astype(np.float32)


def read_initial(config, lora, seed):
    """``read`` of a `TrainedAdapter` for a new adapter."""
    shapes = lora_shapes(config, lora)
    return lambda name, slices: initial_tensor(lora, seed, name, shapes[name])[slices]


def read_adapter(adapter, config, lora):
    """``read`` of a `TrainedAdapter` for an `Adapter` that was saved.

    lora (LoraConfig): the adapter's own settings (`lora_of`).
    """
    places = {}
    for layer in range(config.n_layer):
        for module in modules_of(config, lora.targets):
            a, bs = lora_names(layer, module)
            official = layer_prefix(config, layer) + module.name
            places[a] = official, module, None
            places.update((b, (official, module, index)) for index, b in enumerate(bs))

    def read(name, slices):
        official, module, index = places[name]
        if index is None:
            return adapter.part(official, "A")[slices]
        return split_b(config, module, adapter.part(official, "B"))[index][slices]

    return read
