"""AdamW over a process's parameters (Loshchilov and Hutter, arXiv:1711.05101), as torch computes it."""

import mindspore as ms
from mindspore import Tensor

from telechat.nn.device import device_zeros, on_cpu
from telechat.nn.graphs import SquaredNorm, Update
from telechat.parallel.collectives import all_gather_rows, all_reduce, reduce_scatter_rows
from telechat.training.update_check import UpdateCheck

CHECKED_UPDATES = 2  # of a process, the first ones


class AdamW:
    """Moments, float32 master weights and the step count.

    A master weight is the parameter itself in a float32 model on one process; it is a copy where
    the working weights are of a lower dtype, or where the state is cut over the data-parallel ranks
    (ZeRO stage 1: Rajbhandari et al., arXiv:1910.02054). Then each of them holds the same number of
    rows of every tensor whose rows divide, updates these, and the rows are gathered into the
    parameters.

    Args:
        stage (Stage): whose parameters are updated, a group by one compiled graph.
        config (TrainConfig): betas, eps, weight_decay, max_grad_norm.
        data (Group): the data-parallel ranks.
        shard (bool): whether the state is cut over them.
    """

    def __init__(self, stage, config, data, shard=False):
        self.names = stage.groups()
        self.groups = [[stage.parameters[name] for name in names] for names in self.names]
        self.config = config
        self.data = data
        self.updates = 0
        self.shard = shard and data.size > 1
        self.masters = [[self._master(parameter) for parameter in group] for group in self.groups]
        self.first, self.second = ([[device_zeros(master.shape, ms.float32) for master in group] for group in self.masters]
                                   for _ in range(2))
        self._squared_norm = SquaredNorm(stage.kernels)
        self._unchecked = CHECKED_UPDATES
        self._update = Update(stage.kernels)
        self._kernels = stage.kernels

    def is_cut(self, parameter):
        """Whether a parameter's state is cut along its rows over the data-parallel ranks."""
        return self.shard and parameter.shape[0] % self.data.size == 0

    def own_rows(self, parameter):
        """The rows of a parameter whose state is held here."""
        rows = parameter.shape[0]
        if not self.is_cut(parameter):
            return slice(0, rows)
        width = rows // self.data.size
        return slice(self.data.rank * width, (self.data.rank + 1) * width)

    def _master(self, parameter):
        if self.is_cut(parameter):
            return parameter.data[self.own_rows(parameter)].astype(ms.float32).copy()
        return parameter.data if parameter.dtype == ms.float32 else parameter.data.astype(ms.float32)

    def reduce(self, gradients):
        """Sum gradients over the data-parallel ranks; of cut tensors only the own rows come back."""
        if self.data.size == 1:
            return gradients
        return [[reduce_scatter_rows(gradient, self.data) if self.is_cut(parameter) else all_reduce(gradient, self.data)
                 for parameter, gradient in zip(group, group_gradients)]
                for group, group_gradients in zip(self.groups, gradients)]

    def squares(self, gradients, counts):
        """Squares of reduced gradients, each tensor only where it counts: float32 vectors to be added up.

        counts (callable): ``counts(name, cut)`` → whether this process is the one that counts the
        tensor, which other processes may hold too; cut: whether its rows are spread over data ranks.
        """
        counted = [[gradient for name, parameter, gradient in zip(names, group, group_gradients)
                    if counts(name, self.is_cut(parameter))]
                   for names, group, group_gradients in zip(self.names, self.groups, gradients)]
        if self._kernels.fused:
            counted = [sum(counted, [])]  # what follows the norms is launched once, not once a group
        return [self._squared_norm(*tensors) for tensors in counted if tensors]

    def update(self, gradients, rate, norm, scale=1.0):
        """Clip by the global ``norm`` and step with learning rate ``rate``; gradients are ``scale`` times too large.

        The first updates that change anything are compared with AdamW's formula.

        Raises:
            UpdateLost: the weights are not what the update gives.
        """
        self.updates += 1
        config = self.config
        clip = min(1.0, config.max_grad_norm / (norm + 1e-6)) if config.max_grad_norm else 1.0
        check = None
        if rate and self._unchecked:
            self._unchecked -= 1
            check = UpdateCheck(self, gradients)
        unchanged = clip == scale and self._kernels.fused
        scalars = [None if unchanged else Tensor([clip / scale], ms.float32),
                   *self._kernels.adamw_scalars(self.updates, rate, config.betas, config.eps, config.weight_decay)]
        done = [self._update(*scalars, *masters, *first, *second, *grads, copies=[
                    parameter.data if self._is_copied(parameter) else None for parameter in group])
                for group, masters, first, second, grads in
                zip(self.groups, self.masters, self.first, self.second, gradients) if masters]
        if on_cpu():
            # A later read of a parameter must see the update; a card does all in one order.
            for result in done:
                result.asnumpy()
        self.refresh_parameters(updated=True)
        if check:
            check.finish(rate, clip / scale)

    def take_masters(self):
        """Copy float32 parameters into masters of their own, after the parameters were loaded."""
        for group, masters in zip(self.groups, self.masters):
            for parameter, master in zip(group, masters):
                if self.is_cut(parameter) and parameter.dtype == ms.float32:
                    # A copy: a slice is a view, which an in-place copy on CPU does not take.
                    master.copy_(parameter.data[self.own_rows(parameter)].copy())

    def _is_copied(self, parameter):
        """Whether the update itself writes a parameter, the rounded copy of its master."""
        return not self.is_cut(parameter) and parameter.dtype == self._kernels.copied_dtype

    def refresh_parameters(self, updated=False):
        """Bring the masters into the model's parameters where these are not the same tensors.

        updated: by an update just now, which brought in some.
        """
        for group, masters in zip(self.groups, self.masters):
            for parameter, master in zip(group, masters):
                if self.is_cut(parameter):
                    rows = master if parameter.dtype == ms.float32 else master.astype(parameter.dtype)
                    parameter.data.copy_(all_gather_rows(rows, self.data))
                elif parameter.dtype != ms.float32 and not (updated and self._is_copied(parameter)):
                    self._kernels.copy_rounded(parameter.data, master)

    def state(self):
        """Tensors to save, by name: ``first.NAME``, ``second.NAME`` and, where it is a copy, ``master.NAME``."""
        tensors = {}
        for names, group, *kinds in zip(self.names, self.groups, self.first, self.second, self.masters):
            for name, parameter, first, second, master in zip(names, group, *kinds):
                tensors[f"first.{name}"], tensors[f"second.{name}"] = first, second
                if parameter.dtype != ms.float32:
                    tensors[f"master.{name}"] = master
        return tensors
