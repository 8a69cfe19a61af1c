"""Trainer: one optimizer step on a batch, and the evaluation loss."""

import dataclasses
import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from telechat.errors import InputError
from telechat.model import as_dtype, check_ids
from telechat.nn.device import check_placement, device_zeros, move_to_device, on_cpu
from telechat.nn.inference import has_inference_kernels
from telechat.nn.kernel_choice import choose_kernels
from telechat.parallel.collectives import all_reduce, receive, send
from telechat.parallel.mesh import Mesh
from telechat.parallel.parallel_config import ParallelConfig
from telechat.parallel.pipeline import run_schedule
from telechat.parallel.plan import cut_axis
from telechat.parallel.stage import Stage
from telechat.training.loss_scale import LossScale
from telechat.training.optimizer import AdamW
from telechat.training.schedule import learning_rate
from telechat.training.step import StageCompute, total

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one training step did.

    ``loss`` is the mean cross entropy over the counted tokens, ``grad_norm`` the global norm before
    clipping, ``tokens`` the number of counted tokens; ``skipped`` where a loss or gradient was not
    finite and nothing was changed. In float16 ``loss_scale`` is the scale it was computed with, after
    ``overflows`` attempts with larger ones. ``stop``: whether any process was asked to stop.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    skipped: bool = False
    loss_scale: float = None
    overflows: int = 0
    stop: bool = False


class Trainer:
    """Trains ``model`` in place; on several processes each has its `Stage` and all are given the same batches.

    Args:
        model (TeleChat or Stage): its weights get ``config.dtype``.
        config (TrainConfig): hyper-parameters.
        parallel (ParallelConfig), mesh (Mesh): how the run is spread; one process where not given.
        adapter (TrainedAdapter): trained in the place of the model's weights, which stay as they are; None: they are.

    Attributes:
        trained (Stage or TrainedAdapter): what the optimizer updates.
    """

    def __init__(self, model, config, parallel=None, mesh=None, adapter=None):
        self.model = model
        self.config = config
        self.mesh = mesh or Mesh.single()
        self.step = 0  # batches seen; skipped ones count
        dtype = as_dtype(config.dtype)
        self.loss_scale = LossScale(config.loss_scale, config.loss_scale_window) if config.dtype == "float16" else None
        if has_inference_kernels():
            raise InputError("this process was prepared for generation alone (telechat.nn.inference), where kernels have "
                             "no gradient; train in another process")
        cells = [model] if not isinstance(model, Stage) else model.blocks
        if adapter is None and any(getattr(cell, "is_quantised", False) for one in cells for _, cell in one.cells_and_names()):
            raise InputError("the model's products are quantised and cannot be trained themselves; train an adapter beside "
                             "them (lora in the configuration), or convert the model with --dequantize")
        if model.dtype != dtype:
            for parameter in (model.parameters.values() if isinstance(model, Stage) else model.get_parameters()):
                if parameter.requires_grad:  # not what a quantised product is made of
                    parameter.set_dtype(dtype)
                    move_to_device(parameter)
        if model.dtype != dtype or (config.kernels, config.use_flash_attention) != (None, None):
            model.dtype = dtype
            model.set_kernels(choose_kernels(model.config, dtype, config.kernels, config.use_flash_attention))
        model.kernels.require_device()
        self.stage = model if isinstance(model, Stage) else Stage.of_model(model)
        self.stage.set_kernels(self.stage.kernels.for_training())
        self.parallel = parallel or ParallelConfig()
        self.adapter, self.trained = adapter, self.stage
        if adapter is not None:
            self.trained, adapter.kernels = adapter, self.stage.kernels
        self.compute = StageCompute(self.stage, self.mesh, self.parallel, config.seed, config.mask_padding,
                                    config.restart_positions, adapter)
        self.optimizer = AdamW(self.trained, config, self.mesh.data, self.parallel.shard_optimizer)
        check_placement({**self.stage.parameters, **self.trained.parameters, **self.optimizer.state()})

    @property
    def layer_passes(self):
        """How many times a step goes through a layer here: forwards and back, for each micro-batch."""
        return 2 * len(self.stage.layers) * self.config.micro_batches

    def train_step(self, input_ids, labels, segment_ids=None, each_layer=None, stop=lambda: False):
        """One step on one batch, cut into ``micro_batches`` on each data-parallel rank.

        Args:
            input_ids (array or Tensor): int32 (B, S), the whole batch on every process.
            labels (array or Tensor): int32 (B, S), equal to input_ids where the loss counts, else
                -100; position t is predicted from the tokens before it.
            segment_ids (array): int (B, S), which conversation each token belongs to, equal numbers side by
                side; None: every token sees all before it.
            each_layer (callable): called after each layer's forward and backward pass; None: nobody is told.
            stop (callable): whether this process is asked to stop; what it says goes with the loss to all others, so that all
                stop at one step. What comes after that waits for the next step.

        Returns:
            StepResult, the same on every process.

        Raises:
            InputError: shapes differ, B does not divide, or an id is out of range.
        """
        self.compute.each_layer = each_layer or (lambda: None)
        inputs, targets = self._shift(input_ids, labels)
        segment_ids = self._own_segment_ids(segment_ids, inputs)
        inputs, targets, tokens = *self._own_parts(inputs, targets), int((targets >= 0).sum())
        # Every micro-batch divides by the whole batch's count, so that cutting changes nothing.
        weight = 1.0 / max(tokens, 1)
        overflows = 0
        while True:
            loss, norm, asked, gradients, scale = self._gradients(inputs, targets, segment_ids, weight, stop)
            # The same batch again with a smaller scale, so that an overflow loses no data.
            if math.isfinite(norm) or not math.isfinite(loss) or self.loss_scale is None:
                break
            if not self.loss_scale.back_off():
                break
            overflows += 1
        rate = learning_rate(self.config, self.step)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and tokens:
            self.optimizer.update(gradients, rate, norm, scale)
        if finite and self.loss_scale is not None:
            self.loss_scale.succeed()
        self.step += 1
        return StepResult(loss, norm, rate, tokens, not finite, None if self.loss_scale is None else scale, overflows,
                          asked > 0 or (self.mesh.world.size == 1 and stop()))

    def _gradients(self, inputs, targets, segment_ids, weight, stop):
        """Loss, norm, how many processes are to stop, gradients times the loss scale, and that scale."""
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        data = self.mesh.data
        first = data.rank * len(inputs) * len(inputs[0])  # of the whole batch's sequences
        parts = [(ids, (self.step, first + part * len(ids)), numbers)
                 for part, (ids, numbers) in enumerate(zip(inputs, segment_ids))]
        losses = run_schedule(self.compute, self.mesh.pipeline, parts, self._rows(inputs[0]),
                              self.stage.config.hidden_size,
                              lambda part: self.compute.loss_and_gradient(part, targets[part], weight * scale))
        gradients = self.optimizer.reduce(self._complete(self.compute.take_gradients()))
        loss, square, asked = self._totals(losses, self.optimizer.squares(gradients, self._counts), float(stop()))
        self.compute.send.clear()
        return loss / scale, math.sqrt(square) / scale, asked, gradients, scale

    def evaluate(self, batches):
        """Mean loss over the counted tokens of ``batches``, each the arguments of `train_step`; no dropout.

        Raises InputError where no token counts.
        """
        total, tokens = 0.0, 0
        for input_ids, labels, *segment_ids in batches:
            inputs, targets = self._shift(input_ids, labels)
            tokens += int((targets >= 0).sum())
            segment_ids = self._own_segment_ids(segment_ids[0] if segment_ids else None, inputs)
            for ids, wanted, numbers in zip(*self._own_parts(inputs, targets), segment_ids):
                total += self._evaluate(ids, wanted, numbers)
        self.compute.send.clear()
        if not tokens:
            raise InputError("the evaluation data holds no token that counts")
        return self._sum_over_world(total if self.mesh.tensor.rank == 0 else 0.0)[0] / tokens

    def _evaluate(self, ids, wanted, segment_ids):
        pipeline, x = self.mesh.pipeline, None
        shape = (self._rows(ids), self.stage.config.hidden_size)
        if pipeline.rank > 0:
            x = receive(shape, self.stage.compute_dtype, pipeline.rank - 1, pipeline)
        x = self.compute.forward("evaluation", ids, x, train=False, segment_ids=segment_ids)
        if pipeline.rank == pipeline.size - 1:
            return self.compute.loss("evaluation", wanted, 1.0)
        send(x, pipeline.rank + 1, pipeline).wait()
        return 0.0

    def _own_parts(self, *arrays):
        """This data-parallel rank's micro-batches of each array."""
        inputs = arrays[0]
        data, parts = self.mesh.data, self.config.micro_batches
        if len(inputs) % (data.size * parts):
            ranks = f" on each of {data.size} data-parallel ranks" if data.size > 1 else ""
            raise InputError(f"a batch of {len(inputs)} rows cannot be cut into micro_batches {parts}{ranks}; "
                             f"make it a multiple of {data.size * parts}")
        own = [np.split(array, data.size)[data.rank] for array in arrays]
        if self.parallel.sequence_parallel and self._size(own[0]) // parts % self.mesh.tensor.size:
            raise InputError(f"a micro-batch of {self._size(own[0]) // parts} tokens cannot be cut over "
                             f"{self.mesh.tensor.size} tensor-parallel ranks; turn parallel.sequence_parallel off "
                             "or change batch_size or the sequence length")
        return [np.split(array, parts) for array in own]

    def _own_segment_ids(self, segment_ids, inputs):
        """This data-parallel rank's micro-batches of segment ids for shifted ``inputs``; a list of None for None."""
        if segment_ids is None:
            return [None] * self.config.micro_batches
        segment_ids = segment_ids.asnumpy() if isinstance(segment_ids, ms.Tensor) else np.asarray(segment_ids)
        if segment_ids.shape != (inputs.shape[0], inputs.shape[1] + 1):
            raise InputError(f"segment_ids have shape {segment_ids.shape}, input_ids "
                             f"{(len(inputs), inputs.shape[1] + 1)}: they must agree")
        return self._own_parts(segment_ids[:, :-1])[0]

    @staticmethod
    def _size(array):
        return array.shape[0] * array.shape[1]

    def _rows(self, ids):
        """Rows of the activations that a stage hands on."""
        return self._size(ids) // (self.mesh.tensor.size if self.parallel.sequence_parallel else 1)

    def _complete(self, gradients):
        """Add what other processes of the same data-parallel rank know of a gradient held here.

        In sequence parallelism norms and biases saw only this rank's rows, except the last norm, which
        sees all; a tied embedding is used in the first and the last stage. What is whole of an adapter saw the own part
        of a product's outputs (A) or inputs (B).
        """
        for group, names in enumerate(self.optimizer.names):
            for place, name in enumerate(names):
                gradient = gradients[group][place]
                partial = self.parallel.sequence_parallel and not name.endswith("ln_f.weight")
                if cut_axis(name) is None and (partial or self.adapter is not None):
                    gradient = all_reduce(gradient, self.mesh.tensor)
                if name.endswith("word_embeddings.weight") and self.stage.config.tie_word_embeddings:
                    # The last stage's is float32, the first one's only where it is a sum of micro-batches.
                    gradient = all_reduce(gradient.astype(ms.float32), self.mesh.embedding)
                gradients[group][place] = gradient
        return gradients

    def _counts(self, name, cut):
        """Whether this process counts a tensor towards the global norm: each element exactly once."""
        if self.mesh.data.rank > 0 and not cut:
            return False
        if self.mesh.tensor.rank > 0 and cut_axis(name) is None:
            return False
        return self.stage.first or not name.endswith("word_embeddings.weight")

    def _totals(self, losses, squares, flag):
        """The sums of all losses, of all squares of gradients and of a number over all processes.

        On CPU in float64; on a card in float32 and by one read of the device, the only one in a step.
        """
        if self.mesh.tensor.rank > 0:
            losses = []
        if on_cpu():
            return self._sum_over_world(float(sum(map(total, losses))), float(sum(map(total, squares))), flag)
        sums = [ops.concat(vectors).sum() if vectors else device_zeros((), ms.float32) for vectors in (losses, squares)]
        if self.mesh.world.size == 1:
            return (*ops.stack(sums).asnumpy().astype(np.float64).tolist(), flag)
        sums.append(self.compute.send(np.array(flag, np.float32)))
        return all_reduce(ops.stack(sums), self.mesh.world).asnumpy().astype(np.float64).tolist()

    def _sum_over_world(self, *values):
        if self.mesh.world.size == 1:
            return values
        # As pairs of float32, high and low part: the sums keep more than float32's digits.
        pairs = [part for value in values for part in (np.float32(value), np.float32(value - float(np.float32(value))))]
        sums = all_reduce(Tensor(np.array(pairs, np.float32)), self.mesh.world).asnumpy().astype(np.float64)
        return tuple(sums.reshape(-1, 2).sum(axis=1))

    def _shift(self, input_ids, labels):
        """Inputs without their last token, and what each is to predict."""
        vocabulary = self.stage.config.vocab_size
        ids = check_ids(input_ids, vocabulary)
        labels = labels.asnumpy() if isinstance(labels, ms.Tensor) else np.asarray(labels)
        if labels.shape != ids.shape:
            raise InputError(f"labels have shape {labels.shape}, input_ids {ids.shape}: they must agree")
        if ids.shape[1] < 2:
            raise InputError("a training sequence must have at least 2 tokens")
        if labels.max() >= vocabulary or np.any((labels < 0) & (labels != IGNORED)):
            raise InputError(f"a label must be a token id below {vocabulary} or {IGNORED}")
        return ids[:, :-1], labels[:, 1:].astype(np.int32)
