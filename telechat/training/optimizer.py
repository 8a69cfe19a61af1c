"""AdamW over a model's parameters (Loshchilov and Hutter, arXiv:1711.05101), as torch computes it."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from telechat.training.graphs import SquaredNorm, Update


class AdamW:
    """Moments, float32 master weights where the model's are of a lower dtype, and the step count.

    Args:
        groups (list of lists of Parameter): a group is updated by one compiled graph.
        config (TrainConfig): betas, eps, weight_decay, max_grad_norm.
    """

    def __init__(self, groups, config):
        self.groups = groups
        self.config = config
        self.updates = 0
        self.has_working = groups[0][0].dtype != ms.float32
        self.masters = [[p.data.astype(ms.float32) if self.has_working else p.data for p in group]
                        for group in groups]
        self.first = [[ops.zeros(p.shape, ms.float32) for p in group] for group in groups]
        self.second = [[ops.zeros(p.shape, ms.float32) for p in group] for group in groups]
        self._squared_norm = SquaredNorm()
        self._update = Update()

    def gradient_norm(self, gradients):
        """The global 2-norm of gradients grouped like the parameters, a Python float."""
        squares = [self._squared_norm(*group) for group in gradients]
        return float(np.sqrt(np.sum([square.asnumpy().astype(np.float64) for square in squares])))

    def update(self, gradients, rate, norm):
        """Clip by the global ``norm`` and step with learning rate ``rate``.

        The kernel has no bias correction, so with c1 = 1 − β1^t and c2 = 1 − β2^t it gets
        rate·√c2/c1, eps·√c2 and decay·c1/√c2, which makes it torch's AdamW.
        """
        self.updates += 1
        config = self.config
        beta1, beta2 = config.betas
        c1, root_c2 = 1 - beta1 ** self.updates, (1 - beta2 ** self.updates) ** 0.5
        clip = min(1.0, config.max_grad_norm / (norm + 1e-6)) if config.max_grad_norm else 1.0
        scalars = [_scalar(value) for value in (clip, rate * root_c2 / c1, beta1, beta2, config.eps * root_c2,
                                                config.weight_decay * c1 / root_c2, 0.0)]
        done = [self._update(*scalars, *masters, *first, *second, *grads)
                for masters, first, second, grads in zip(self.masters, self.first, self.second, gradients)]
        # A later read of a parameter must see the update: wait for every group.
        for result in done:
            result.asnumpy()
        if self.has_working:
            self.refresh_working()

    def refresh_working(self):
        """Round the masters into the model's parameters."""
        for group, masters in zip(self.groups, self.masters):
            for parameter, master in zip(group, masters):
                parameter.data.copy_(master)

    def state(self):
        """Tensors to save, by name: ``first.NAME``, ``second.NAME`` and, where kept, ``master.NAME``."""
        kinds = {"first": self.first, "second": self.second}
        if self.has_working:
            kinds["master"] = self.masters
        return {f"{kind}.{parameter.name}": tensor
                for kind, tensors in kinds.items()
                for group, group_tensors in zip(self.groups, tensors)
                for parameter, tensor in zip(group, group_tensors)}


def _scalar(value):
    return Tensor(value, ms.float32)
