"""Whether an update arrived: on some values of each parameter AdamW is computed again, in float64.

What a compiled graph writes to a tensor that is not in the device's memory is lost without a word
(telechat/nn/device.py), and a run would go on with its first weights.
"""

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from telechat.nn.device import on_cpu

VALUES = 256  # of each parameter, from its first rows on
# How far a value may be from the formula's, as a share of its change and of itself: float32, and a gradient that was
# rounded once more.
OF_CHANGE, OF_VALUE = 0.02, 1e-6
ROUNDING = {ms.float32: 0.0, ms.float16: 2.0 ** -10, ms.bfloat16: 2.0 ** -7}


class UpdateLost(RuntimeError):
    """The weights after an update are not what the update gives."""


class UpdateCheck:
    """Compares an update of an `AdamW` with its formula.

    Args:
        optimizer (AdamW): before the update.
        gradients (list of lists): as `AdamW.update` is given them.
    """

    def __init__(self, optimizer, gradients):
        self._optimizer = optimizer
        self._gradients = [list(map(_sample, group)) for group in gradients]
        self._before = self._read()

    def _read(self):
        """Samples of masters, first and second moments, for each group."""
        optimizer = self._optimizer
        return [[tuple(map(_sample, tensors)) for tensors in zip(*group)]
                for group in zip(optimizer.masters, optimizer.first, optimizer.second)]

    def finish(self, rate, factor):
        """To be called behind the update.

        Args:
            rate (float): its learning rate.
            factor (float): what gradients were multiplied by: clipping, and one over the loss scale.

        Raises:
            UpdateLost: master weights or moments are not what the formula gives, or weights not their masters'.
        """
        groups = zip(self._optimizer.names, self._optimizer.groups, self._before, self._read(), self._gradients)
        for names, parameters, *values in groups:
            for name, parameter, before, after, gradient in zip(names, parameters, *values):
                self._compare(name, before, after, gradient * factor, rate, parameter.ndim > 1)
                self._compare_weight(name, parameter, after[0])
        if not on_cpu():
            self._compare_in_graphs()

    def _compare(self, name, before, after, gradient, rate, decays):
        """One parameter's samples with AdamW's formula (arXiv:1711.05101, algorithm 2, as torch computes it)."""
        config, updates = self._optimizer.config, self._optimizer.updates
        weight, first, second = before
        beta1, beta2 = config.betas
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient ** 2
        root = np.sqrt(second / (1 - beta2 ** updates)) + config.eps
        expected = weight * (1 - rate * config.weight_decay * decays) - rate * first / (1 - beta1 ** updates) / root
        for what, was, wanted, found in (("weights", weight, expected, after[0]), ("moments", before[1], first, after[1]),
                                         ("moments", before[2], second, after[2])):
            allowed = OF_CHANGE * np.abs(wanted - was) + OF_VALUE * np.maximum(np.abs(was), np.abs(wanted)) + 1e-30
            if np.any(np.abs(found - wanted) > allowed):
                place = int(np.argmax(np.abs(found - wanted) - allowed))
                raise UpdateLost(f"update {updates} of {name} did not arrive: its {what} went from {was[place]:.6g} to "
                                 f"{found[place]:.6g} and should be {wanted[place]:.6g}; nothing would be learnt, so the "
                                 "run stops: try tools/doctor.py")

    def _compare_weight(self, name, parameter, master):
        """The weight that is computed with is its master, rounded."""
        rows = self._optimizer.own_rows(parameter)
        weight = _sample(parameter.data[rows] if self._optimizer.is_cut(parameter) else parameter.data)
        if np.any(np.abs(weight - master) > ROUNDING[parameter.dtype] * np.abs(master) + 6e-8):
            raise UpdateLost(f"after update {self._optimizer.updates} {name} is not its float32 master weight, rounded to "
                             f"{str(parameter.dtype).lower()}; the run stops: try tools/doctor.py")

    def _compare_in_graphs(self):
        """The same of all values, as the graphs of the next step will see them."""
        difference = Difference()
        for names, parameters, masters in zip(self._optimizer.names, self._optimizer.groups, self._optimizer.masters):
            whole = [(name, parameter.data, master) for name, parameter, master in zip(names, parameters, masters)
                     if not self._optimizer.is_cut(parameter)]
            for name, largest in zip((name for name, *_ in whole),
                                     difference(*(pair for _, *pairs in whole for pair in pairs)).asnumpy()
                                     if whole else ()):
                if largest:
                    raise UpdateLost(f"after update {self._optimizer.updates} a graph sees other values of {name} than "
                                     f"its master weight's, by {largest:.3g}; the run stops: try tools/doctor.py")


class Difference(nn.Cell):
    """The largest difference of weights and masters rounded to their dtype: weight, master, weight, … → float32."""

    @ms.jit
    def construct(self, *tensors):
        largest = ()
        for weight, master in zip(tensors[::2], tensors[1::2]):
            apart = weight.astype(ms.float32) - master.astype(weight.dtype).astype(ms.float32)
            largest = largest + (ops.abs(apart).max().reshape(1),)
        return ops.concat(largest)


def _sample(tensor):
    """Some values of a tensor, float64: `VALUES` of its first rows."""
    if tensor.ndim > 1:
        tensor = tensor[:-(-VALUES // tensor.shape[1])]
    return tensor.astype(ms.float32).asnumpy().reshape(-1)[:VALUES].astype(np.float64)
