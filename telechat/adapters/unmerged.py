"""LoRA adapters beside a model's weights and not in them: several at a time, each row of a batch with its own.

y = Wx + s·B(Ax) (arXiv:2106.09685). The factors of all adapters stand side by side, A (R, inputs) and B (outputs, R) with
R the sum of their ranks, and a row takes the columns of its adapter: B((Ax) ⊙ m), m being 1 there and 0 elsewhere. So one
computation serves rows of different adapters and of none, and what a row gets does not depend on the others.
"""

import numpy as np

from telechat.checkpoint.products import PRODUCTS, product_weight
from telechat.errors import InputError


class AdapterSet:
    """Adapters of one base model.

    Args:
        adapters (dict): name → `Adapter`.
        config (TeleChatConfig): the base model's.
        tensor (callable): float32 array → what the model computes with.
        part (callable): (canonical name, (outputs, inputs)) → a slice of each, the part of a product that is computed
            here; None: all.

    Attributes:
        names (tuple): of the adapters.
        rank (int): R.
        layers: for each layer A and B of each of `PRODUCTS`, one behind the other; two None where no adapter changes it.

    Raises:
        InputError: as `check_beside`.
    """

    def __init__(self, adapters, config, tensor, part=None):
        self.names = tuple(adapters)
        ranks = {}
        for name, adapter in adapters.items():
            check_beside(adapter, config)
            ranks[name] = adapter.largest_rank
        ends = np.cumsum([0, *ranks.values()])
        self._columns = {name: slice(first, last) for name, first, last in zip(ranks, ends, ends[1:])}
        self.rank = int(ends[-1])
        self.layers = []
        for layer in range(config.n_layer):
            factors = []
            for product in PRODUCTS:
                parameter = product_weight(layer, product)
                stacked = self._stacked(adapters, parameter, part)
                factors += [None, None] if stacked is None else map(tensor, stacked)
            self.layers.append(factors)

    def _stacked(self, adapters, parameter, part):
        """A and B of a parameter, or None; a rank below the adapter's largest is filled up with zeros."""
        both = None
        # A product that one layer's adapter has is there in all layers, so that one graph serves them.
        same = parameter.split(".", 3)[3]
        for name, adapter in adapters.items():
            like = next((other for other in adapter.parameters if other.split(".", 3)[3] == same), None)
            if like is None:
                continue
            a, b = adapter.factors(parameter if parameter in adapter.parameters else like)
            if parameter not in adapter.parameters:
                a, b = np.zeros_like(a), np.zeros_like(b)
            if part is not None:
                outputs, inputs = part(parameter, (len(b), a.shape[1]))
                a, b = a[:, inputs], b[outputs]
            if both is None:
                both = np.zeros((self.rank, a.shape[1]), np.float32), np.zeros((len(b), self.rank), np.float32)
            first = self._columns[name].start
            both[0][first:first + len(a)], both[1][:, first:first + len(a)] = a, b
        return both

    def columns(self, names):
        """m of rows with the adapters of these names, None for none: float32 (rows, R); None where no row has one."""
        if not any(names):
            return None
        chosen = np.zeros((len(names), self.rank), np.float32)
        for row, name in zip(chosen, names):
            if name is not None:
                row[self._columns[name]] = 1
        return chosen

    @property
    def nbytes(self):
        """Bytes of the factors held here, as float32."""
        return 4 * sum(int(np.prod(factor.shape)) for layer in self.layers for factor in layer if factor is not None)


def check_beside(adapter, config):
    """InputError where an adapter (an `Adapter`, or an `AdapterInTraining`) changes more than products of blocks, by factors."""
    inside = {product_weight(layer, product) for layer in range(config.n_layer) for product in PRODUCTS}
    for parameter in sorted(adapter.trained_whole | (adapter.parameters - inside)):
        where = "which was trained whole" if parameter.startswith("transformer.h.") else "which lies outside the blocks"
        raise InputError(f"{adapter.directory} changes {parameter.removesuffix('.weight')}, {where}; merge it into the model "
                         "(tools/convert.py merge-lora) and serve that")
