"""Embedding, head and cross entropy over a vocabulary that is cut over tensor-parallel ranks.

Each rank holds rows [first, first + rows) of the embedding and of the head. The logits are never
gathered: the loss needs their maximum, the sum of their exponentials and the label's logit, one
number a token each (Shoeybi et al., arXiv:1909.08053, section 3).
"""

import mindspore as ms
import numpy as np
from mindspore import ops

from telechat.parallel.collectives import (AllReduceMax, AllReduceSum, CopyTo, ReduceFrom, ScatterRows, all_gather_rows)
from telechat.nn.device import device_tensor
from telechat.nn.graphs import Embed, HeadLoss
from telechat.nn.portable_kernels import MASKED


class VocabularyEmbed(Embed):
    """`Embed` for a rank's rows of the vocabulary.

    Args:
        config (TeleChatConfig): the model.
        dtype: of the activations.
        first (int): token of the first row here.
        tensor (Group): the tensor-parallel ranks.
        sequence_parallel (bool): whether a rank keeps only its rows of the result.
        kernels (Kernels): what computes.
    """

    def __init__(self, config, dtype, first, tensor, sequence_parallel, kernels):
        super().__init__(config, dtype, kernels)
        self.first = first
        self.tensor = tensor
        self.sequence_parallel = sequence_parallel
        self.reduce_from = ScatterRows(tensor) if sequence_parallel else ReduceFrom(tensor)

    def construct(self, input_ids, dropout, weight):
        rows, inside = self._own(input_ids, weight.shape[0])
        x = self.reduce_from(self.kernels.embedding(rows, weight, self.dtype) * inside.astype(self.dtype))
        return self.scaled(x, dropout)

    def backward(self, dx, input_ids, dropout, weight):
        dx = self.scaled(dx, dropout)
        if self.sequence_parallel:
            dx = all_gather_rows(dx, self.tensor)
        rows, inside = self._own(input_ids, weight.shape[0])
        return self.kernels.embedding_gradient(dx * inside.astype(dx.dtype), rows, weight)

    def _own(self, input_ids, count):
        """Row of each token, 0 where another rank holds it, and 1 or 0 for that as a column."""
        rows = input_ids - self.first
        inside = ops.logical_and(rows >= 0, rows < count)
        return rows * inside.astype(ms.int32), inside.reshape(-1, 1)


class VocabularyHeadLoss(HeadLoss):
    """`HeadLoss` for a rank's rows of the head; arguments as `VocabularyEmbed`'s.

    x must hold all rows: in the sequence-parallel region the caller gathers them first.
    """

    def __init__(self, config, first, rows, tensor, kernels):
        super().__init__(config, kernels)
        self.first = first
        self.copy_to = CopyTo(tensor)
        self.takes_all = False
        self.maximum = AllReduceMax(tensor)
        self.total = AllReduceSum(tensor)
        # The last rank's rows may reach past the vocabulary: their logits take no part.
        self.padding = None
        if first + rows > config.vocab_size:
            beyond = np.arange(first, first + rows) >= config.vocab_size
            self.padding = device_tensor(np.where(beyond, np.float32(MASKED), np.float32(0)))

    def cross_entropy(self, logits, labels, weights):
        """As `Kernels.token_cross_entropy`, over all ranks' logits; the gradient is that of the own ones."""
        logits = logits.astype(ms.float32)
        if self.padding is not None:
            logits = logits + self.padding
        shifted = logits - self.maximum(ops.ReduceMax(keep_dims=True)(logits, -1))
        exponentials = ops.exp(shifted)
        total = self.total(ops.ReduceSum(keep_dims=True)(exponentials, -1))
        own = labels - self.first
        inside = ops.logical_and(own >= 0, own < logits.shape[1]).astype(ms.float32)
        index = ops.stack((ops.arange(0, labels.shape[0]).astype(ms.int32), own * inside.astype(ms.int32)), -1)
        label_logits = self.total(ops.depend(ops.gather_nd(shifted, index) * inside, total))
        gradient = exponentials * (weights.reshape(-1, 1) / total)
        gradient = ops.tensor_scatter_add(gradient, index, -weights * inside)
        return (ops.log(total).reshape(-1) - label_logits) * weights, gradient


def embed_for(stage, tensor, sequence_parallel):
    """The embedding of a `Stage`: plain on one rank, else of its part of the vocabulary."""
    if tensor.size == 1:
        return Embed(stage.config, stage.compute_dtype, stage.kernels)
    return VocabularyEmbed(stage.config, stage.compute_dtype, stage.first_token, tensor, sequence_parallel,
                           stage.kernels)


def head_loss_for(stage, tensor):
    """Head and loss of a `Stage`, likewise; None where another stage holds the head."""
    if not stage.last:
        return None
    if tensor.size == 1:
        return HeadLoss(stage.config, stage.kernels)
    return VocabularyHeadLoss(stage.config, stage.first_token, stage.head_weight.shape[0], tensor, stage.kernels)
