"""Trainer: one optimizer step on a batch, and the evaluation loss."""

import dataclasses
import math

import mindspore as ms
import numpy as np

from telechat.errors import InputError
from telechat.model import as_dtype, check_ids
from telechat.nn import kernels
from telechat.training.optimizer import AdamW
from telechat.training.schedule import learning_rate
from telechat.training.step import LossAndGradients

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one training step did.

    ``loss`` is the mean cross entropy over the counted tokens, ``grad_norm`` the global norm before
    clipping, ``tokens`` the number of counted tokens; ``skipped`` where a loss or gradient was not
    finite and nothing was changed.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    skipped: bool = False


class Trainer:
    """Trains ``model`` in place.

    Args:
        model (TeleChat): its weights get ``config.dtype``.
        config (TrainConfig): hyper-parameters.
    """

    def __init__(self, model, config):
        self.model = model
        self.config = config
        self.step = 0  # batches seen; skipped ones count
        dtype = as_dtype(config.dtype)
        if model.dtype != dtype:
            for parameter in model.get_parameters():
                parameter.set_dtype(dtype)
            model.dtype, model.compute_dtype = dtype, kernels.compute_dtype(dtype)
        self.compute = LossAndGradients(model, config.seed, config.mask_padding)
        self.optimizer = AdamW(self.compute.parameter_groups(), config)

    def train_step(self, input_ids, labels):
        """One step on one batch, cut into ``micro_batches``.

        Args:
            input_ids (array or Tensor): int32 (B, S).
            labels (array or Tensor): int32 (B, S), equal to input_ids where the loss counts, else
                -100; position t is predicted from the tokens before it.

        Returns:
            StepResult.

        Raises:
            InputError: shapes differ, B is no multiple of micro_batches, or an id is out of range.
        """
        inputs, targets = self._shift(input_ids, labels)
        parts = self.config.micro_batches
        if len(inputs) % parts:
            raise InputError(f"a batch of {len(inputs)} rows cannot be cut into micro_batches {parts}; "
                             "make one a multiple of the other")
        tokens = int((targets >= 0).sum())
        # Every micro-batch divides by the whole batch's count, so that cutting changes nothing.
        weight = 1.0 / max(tokens, 1)
        loss, gradients = 0.0, None
        for part, (ids, wanted) in enumerate(zip(np.split(inputs, parts), np.split(targets, parts))):
            part_loss, part_gradients = self.compute(ids, wanted, weight, self.step, part)
            if gradients is None:
                gradients = part_gradients
            else:
                gradients = [self.compute.add(*a, *b) for a, b in zip(gradients, part_gradients)]
            loss += float(part_loss.asnumpy())
        norm = self.optimizer.gradient_norm(gradients)
        rate = learning_rate(self.config, self.step)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and tokens:
            self.optimizer.update(gradients, rate, norm)
        self.step += 1
        return StepResult(loss, norm, rate, tokens, skipped=not finite)

    def evaluate(self, batches):
        """Mean loss over the counted tokens of ``batches``, pairs as in `train_step`; no dropout."""
        total, tokens = 0.0, 0
        for input_ids, labels in batches:
            inputs, targets = self._shift(input_ids, labels)
            total += float(self.compute.loss(inputs, targets, 1.0).asnumpy())
            tokens += int((targets >= 0).sum())
        if not tokens:
            raise InputError("the evaluation data holds no token that counts")
        return total / tokens

    def _shift(self, input_ids, labels):
        """Inputs without their last token, and what each is to predict."""
        ids = check_ids(input_ids, self.model.config.vocab_size)
        labels = labels.asnumpy() if isinstance(labels, ms.Tensor) else np.asarray(labels)
        if labels.shape != ids.shape:
            raise InputError(f"labels have shape {labels.shape}, input_ids {ids.shape}: they must agree")
        if ids.shape[1] < 2:
            raise InputError("a training sequence must have at least 2 tokens")
        if labels.max() >= self.model.config.vocab_size or np.any((labels < 0) & (labels != IGNORED)):
            raise InputError(f"a label must be a token id below {self.model.config.vocab_size} or {IGNORED}")
        return ids[:, :-1], labels[:, 1:].astype(np.int32)
