"""One LoRA adapter for all that a model computes, beside weights that it cannot be added to.

Those are quantised ones, which can hold no sum, and those that a run trains an adapter for, which are to stay as they are.
What is computed is that of unmerged.py, where every row takes all columns.
"""

import numpy as np
from mindspore import Tensor, ops

from telechat.adapters.unmerged import AdapterSet
from telechat.checkpoint.layout import interleave_heads
from telechat.checkpoint.products import PRODUCTS, product_weight
from telechat.nn.device import device_parameter


class Attachment:
    """Where an adapter is put beside a model's weights, and taken away again.

    Graphs hold on to the tensors that they were compiled with, so those of the first adapter stay, and get the values of the
    next one: the same one further trained, or one of the same rank and targets.

    Args:
        model (TeleChat or TensorParallelModel): the adapter's base model.
        part (callable): as of `AdapterSet`; None: the whole model is here.
    """

    def __init__(self, model, part=None):
        self.model = model
        self._part = part
        self._held = {}  # product's weight → A, B and columns

    def put(self, adapter):
        """Let the model compute with an adapter (an `Adapter`, or an `AdapterInTraining`).

        Raises:
            InputError: the adapter changes what is no product of a block.
        """
        factors = AdapterSet({"adapter": adapter}, self.model.config, np.asarray, self._part)
        every = np.ones((1, factors.rank), np.float32)
        for layer, (block, arrays) in enumerate(zip(self.model.transformer.h, factors.layers)):
            for number, linear in enumerate(block.products()):
                a, b = arrays[2 * number:2 * number + 2]
                if a is not None:
                    linear.adapter = self._parameters(product_weight(layer, PRODUCTS[number]), (a, b, every))

    def take_away(self):
        """Let the model compute without an adapter."""
        for block in self.model.transformer.h:
            for linear in block.products():
                linear.adapter = None

    def _parameters(self, name, arrays):
        """Those of one product with these values."""
        if name in self._held:
            for parameter, array in zip(self._held[name], arrays):
                ops.assign(parameter, Tensor(array).astype(parameter.dtype))
        else:
            self._held[name] = tuple(device_parameter(array, self.model.compute_dtype, f"{name}.{part}")
                                     for part, array in zip(("lora_A", "lora_B", "lora_columns"), arrays))
        return self._held[name]


class AdapterInTraining:
    """A `TrainedAdapter` as it is at present, with what `AdapterSet` asks of an `Adapter`.

    Args:
        trained (TrainedAdapter): of all layers, whole.
    """

    directory = "the adapter in training"
    trained_whole = frozenset()

    def __init__(self, trained):
        self._trained = trained
        self._products = {}  # canonical name of a weight → our products that make it
        for layer in trained.layers:
            for product in trained.products:
                weight = "key_value" if product in ("key", "value") else product
                name = next(product_weight(layer, full) for full in PRODUCTS if full.endswith("." + weight))
                self._products.setdefault(name, []).append((layer, product))

    @property
    def parameters(self):
        """Canonical names of what the adapter changes, a set."""
        return set(self._products)

    @property
    def largest_rank(self):
        """As `Adapter.largest_rank`."""
        return max(map(self.rank, self._products))

    def rank(self, name):
        """R of `factors`."""
        return self._trained.lora.rank * len(self._products[name])

    def factors(self, name):
        """As `Adapter.factors`."""
        pairs = [[factor.asnumpy() for factor in self._trained.pair(*place)] for place in self._products[name]]
        scale = np.float32(self._trained.lora.scale)
        if self._products[name][0][1] not in ("key", "value"):
            (a, b), = pairs
            return a, scale * b
        # Keys and values each have ranks of their own, beside which the other's rows are zeros.
        sides, before = {side: np.zeros((len(pairs[0][1]), self.rank(name)), np.float32) for side in ("key", "value")}, 0
        for (_, side), (a, b) in zip(self._products[name], pairs):
            sides[side][:, before:before + len(a)] = b
            before += len(a)
        return (np.concatenate([a for a, _ in pairs]),
                scale * interleave_heads(sides["key"], sides["value"], self._trained.config.num_key_value_heads))
