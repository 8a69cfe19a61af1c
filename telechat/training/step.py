"""Forward and backward passes of the layers that a process holds, through the compiled graphs."""

import dataclasses

import numpy as np
from mindspore import Tensor, ops

from telechat.nn.block_training import NO_LORA, BlockTraining
from telechat.nn.device import Sender
from telechat.nn.dropout import ATTENTION_OUTPUT, EMBEDDING_OUTPUT, FEED_FORWARD_OUTPUT, LORA_INPUT, Place
from telechat.nn.graphs import Accumulate, FrozenHeadLoss
from telechat.nn.lora import PRODUCTS
from telechat.nn.positions import sequence_tables
from telechat.parallel.collectives import all_gather_rows
from telechat.parallel.plan import own_heads
from telechat.parallel.vocabulary import embed_for, head_loss_for

HEAD_ROWS = 64  # the fewest rows of logits that are made at a time


def head_rows(rows, vocab_size, logits):
    """How many of ``rows`` rows of logits are made at a time, about ``logits`` numbers and a multiple of HEAD_ROWS.

    A multiple, so that no thread's share of a vector operation has a tail: there MindSpore's CPU
    kernels compute exp and log in another way, and how they share the work changes from run to run.
    """
    return min(max(logits // vocab_size // HEAD_ROWS, 1), -(-rows // HEAD_ROWS)) * HEAD_ROWS


@dataclasses.dataclass
class _Part:
    """What a micro-batch leaves between its forward and its backward pass."""

    input_ids: np.ndarray
    ids: Tensor  # the same in a row, on the device; None in all but the first stage
    tables: tuple  # cos, sin, and the three of `Kernels.attention_tensors`
    place: tuple  # (step, number of the first sequence in the whole batch): which dropout masks are drawn
    kept: list = dataclasses.field(default_factory=list)  # of each layer: its input, what its backward pass starts from
    output: Tensor = None


class StageCompute:
    """The passes of one `Stage`, micro-batch by micro-batch; gradients add up until they are taken.

    Args:
        stage (Stage): the layers and weights held here; read, never changed.
        mesh (Mesh): this process's place.
        parallel (ParallelConfig): sequence parallelism, recomputation.
        seed (int): of the dropout masks.
        mask_padding (bool): whether pad tokens on the left of a sequence are hidden from attention.
        restart_positions (bool): whether positions count from 0 in each document, where there are any.
        adapter (TrainedAdapter): what is trained in the place of the weights, which are frozen then; None: they are.
    """

    def __init__(self, stage, mesh, parallel, seed=0, mask_padding=False, restart_positions=False, adapter=None):
        self.stage = stage
        self.config = stage.config
        self.kernels = stage.kernels
        self.tensor = mesh.tensor
        self.parallel = parallel
        self.seed = seed
        self.mask_padding = mask_padding
        self.restart_positions = restart_positions
        self.adapter = adapter
        self.block = BlockTraining(stage.functions if adapter is None
                                   else stage.functions.adapted(adapter.products, adapter.lora.scale))
        self.embed = embed_for(stage, mesh.tensor, parallel.sequence_parallel)
        self.head_loss = head_loss_for(stage, mesh.tensor)
        self.frozen_head_loss = None if adapter is None or self.head_loss is None else FrozenHeadLoss(self.head_loss)
        self.add = Accumulate(self.kernels)
        self.send = Sender()
        self._positions = {}
        self._parts = {}
        self._gradients = None
        self._backwards = 0  # since the gradients were taken
        self._sums = {}  # group → float32 tensors that the next step's sums go to
        self.each_layer = lambda: None  # called after each layer's pass in training

    def forward(self, part, input_ids, x=None, place=(0, 0), train=True, segment_ids=None):
        """Run micro-batch ``part`` through the stage's layers.

        Args:
            part: a key for `loss` and `backward`.
            input_ids (array): int32 (B, S); every stage needs its shape and padding.
            x (Tensor): (rows, H) from the stage before; None in the first.
            place (tuple): step, and the first sequence's number in the whole batch, which decide the dropout masks.
            segment_ids (array): int (B, S), which document each token belongs to; None: one a sequence.
            train (bool): False: no dropout, and nothing is kept for a backward pass.

        Returns:
            Tensor: (rows, H); rows are B·S, or this rank's part of them in sequence parallelism.
        """
        job = _Part(input_ids, self.send(input_ids.reshape(-1)) if self.stage.first else None,
                    self._tables(input_ids, segment_ids), place)
        if self.stage.first:
            x = self.embed(job.ids, self._embedding_drop(job) if train else None,
                           self.stage.word_embeddings.weight.data)
        for index, (layer, block) in enumerate(zip(self.stage.layers, self.stage.blocks)):
            drops = self._drops(job, layer) if train else (None, None, None)
            y, kept = self.block.forward(x, job.tables, drops, block.tensors(), self._lora(job, index, train))
            if train:
                job.kept.append((x, None if self.parallel.recompute else kept))
            x = y
            del kept  # what is to be computed again goes before the next layer
            if train:
                self.each_layer()
        job.output = x
        self._parts[part] = job
        return x

    def loss(self, part, labels, token_weight):
        """The last stage's loss of a micro-batch, without gradients; ends the part.

        labels (array): int32 (B, S), the token that each position is to predict, -100 for none;
        token_weight (float): weight of each counted token. Returns a float.
        """
        x = self._all_rows(self._parts.pop(part).output)
        return sum(total(self.head_loss(x, *chunk, *self._head_weights()))
                   for chunk in self._chunks(labels, token_weight))

    def loss_and_gradient(self, part, labels, token_weight):
        """The losses, as tensors to be read when the passes are under way, and the gradient of the stage's output.

        Arguments as of `loss`; `backward` starts from the gradient.
        """
        x = self._all_rows(self._parts[part].output)
        if self.adapter is not None:
            return self._loss_and_input_gradient(x, labels, token_weight)
        losses, gradients = [], None
        for chunk in self._chunks(labels, token_weight, self.head_loss.takes_all):
            made, *grads = self.head_loss.backward(x, *chunk, *self._head_weights())
            losses.append(made)
            gradients = grads if gradients is None else self.add(*gradients, *grads)
        dx, dnorm, dhead = gradients
        if self.stage.lm_head is None:
            self._accumulate(0, [dhead])
            self._accumulate(-1, [dnorm])
        else:
            self._accumulate(-1, [dnorm, dhead])
        return losses, self._own_rows(dx.astype(x.dtype))

    def _loss_and_input_gradient(self, x, labels, token_weight):
        losses, dx = [], None
        for chunk in self._chunks(labels, token_weight, self.head_loss.takes_all):
            made, gradient = self.frozen_head_loss.backward(x, *chunk, *self._head_weights())
            losses.append(made)
            dx = gradient if dx is None else self.add(dx, gradient)[0]
        return losses, self._own_rows(dx.astype(x.dtype))

    def backward(self, part, dx):
        """Back through the stage's layers; returns the gradient of its input, None in the first stage."""
        job = self._parts.pop(part)
        self._backwards += 1
        for index in reversed(range(len(self.stage.blocks))):
            weights = self.stage.blocks[index].tensors()
            drops = self._drops(job, self.stage.layers[index])
            dx, *gradients = self.block.backward(dx, *job.kept.pop(), job.tables, drops, weights, self._lora(job, index))
            if self.adapter is not None:
                gradients = self.adapter.gradients(index, gradients)
            self._accumulate(index + 1, gradients)
            self.each_layer()
        if not self.stage.first:
            return dx
        if self.adapter is not None:
            return None
        weight = self.stage.word_embeddings.weight.data
        self._accumulate(0, [self.embed.backward(dx, job.ids, self._embedding_drop(job), weight)])
        return None

    def take_gradients(self):
        """The gradients since the last call, as lists in the order of `Stage.groups`."""
        gradients, self._gradients = self._gradients, None
        gradients = [group or [] for group in gradients]
        if self.kernels.fused and self._backwards > 1:
            # A card keeps the sums of micro-batches for the next step's: the pool's pieces do not fit each other's sizes.
            self._sums = dict(enumerate(map(list, gradients)))
        self._backwards = 0
        return gradients

    def _accumulate(self, group, gradients):
        if self._gradients is None:
            self._gradients = [None] * (len(self.stage.blocks) + 2)
        sums = self._gradients[group]
        if sums is not None:
            sums = self.add(*sums, *gradients)
        elif group in self._sums:
            sums = self._sums[group]
            for total, gradient in zip(sums, gradients):
                total.copy_(gradient)
        else:
            sums = gradients
        self._gradients[group] = list(sums)

    def _head_weights(self):
        return self.stage.ln_f.weight.data, self.stage.head_weight.data

    def _tables(self, input_ids, segment_ids=None):
        """Rotary tables and what attention needs to know of a micro-batch; kept while the length stays the same."""
        length = input_ids.shape[1]
        if length not in self._positions:
            self._positions = {length: (*map(self.kernels.rotary_tensor, sequence_tables(self.config, length)),
                                        *self._visible(length))}
        tables = self._positions[length]
        if segment_ids is not None:
            # Pads are a document of their own: conversations do not see them.
            cos, sin = tables[:2]
            if self.restart_positions:
                positions = Tensor(_positions_within(segment_ids).astype(np.int32))
                cos, sin = (ops.gather(table[0, 0], positions, 0).expand_dims(1) for table in (cos, sin))
            return (cos, sin, *self._visible(length, segment_ids=segment_ids))
        if self.mask_padding:
            # Only pads before the first other token: a pad id further on was put there by the data.
            shown = np.cumsum(input_ids != self.config.pad_token_id, axis=1) > 0
            tables = (*tables[:2], *self._visible(length, shown))
        return tables

    def _visible(self, length, padding=None, segment_ids=None):
        heads = own_heads(self.config, self.tensor)
        return self.kernels.attention_tensors(self.config, length, padding, segment_ids, heads,
                                              self.config.attention_dropout > 0)

    def _drops(self, job, layer):
        """Dropout masks of a block: attention, and the two outputs added to the residual."""
        config = self.config
        heads = range(config.n_head)[own_heads(config, self.tensor)]
        attention = self.kernels.attention_dropout(job.input_ids.shape[1], config.attention_dropout,
                                                   self._place(job, layer), heads)
        outputs = [self._output_dropout(config.hidden_dropout, job, layer, stream)
                   for stream in (ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT)]
        return (attention, *outputs)

    def _lora(self, job, index, train=True):
        """The adapter of the ``index``-th layer here and, in training, its dropout masks, as `BlockTraining` takes them."""
        if self.adapter is None:
            return NO_LORA
        rate = self.adapter.lora.dropout if train else 0.0
        masks = {}
        for product, inputs, columns in (place for half in self.adapter.dropouts for place in half):
            if product not in masks:
                stream = LORA_INPUT + PRODUCTS.index(product)
                mask = self.kernels.output_dropout(job.input_ids.shape[1], inputs, rate,
                                                   self._place(job, self.stage.layers[index]), stream)
                whole = mask is None or columns.stop - columns.start == inputs
                masks[product] = mask if whole else mask[:, columns].contiguous()
        return [(pairs, [masks[product] for product, _, _ in half])
                for pairs, half in zip(self.adapter.tensors(index), self.adapter.dropouts)]

    def _embedding_drop(self, job):
        return self._output_dropout(self.config.embedding_dropout, job, self.config.n_layer, EMBEDDING_OUTPUT)

    def _output_dropout(self, rate, job, layer, stream):
        """A mask of activations, this rank's rows of it."""
        size = job.input_ids.shape[1], self.config.hidden_size
        return self._own_rows(self.kernels.output_dropout(*size, rate, self._place(job, layer), stream))

    def _place(self, job, layer):
        step, first = job.place
        return Place(self.seed, step, range(first, first + len(job.input_ids)), layer)

    def _own_rows(self, rows):
        """This rank's part of all rows in the sequence-parallel region; None for None."""
        if rows is None or not self.parallel.sequence_parallel:
            return rows
        width = rows.shape[0] // self.tensor.size
        return rows[self.tensor.rank * width:(self.tensor.rank + 1) * width].contiguous()

    def _all_rows(self, x):
        return all_gather_rows(x, self.tensor) if self.parallel.sequence_parallel else x

    def _chunks(self, labels, token_weight, all_at_once=False):
        """The counted rows of ``labels`` in chunks of one fixed size, filled up with rows of weight 0; or in a single one."""
        flat = labels.reshape(-1)
        size = flat.size if all_at_once else head_rows(flat.size, self.config.vocab_size, self.kernels.logits_at_once)
        counted = np.flatnonzero(flat >= 0).astype(np.int32)
        for start in range(0, max(len(counted), 1), size):
            chosen = counted[start:start + size]
            rows, chunk_labels = np.zeros(size, np.int32), np.zeros(size, np.int32)
            weights = np.zeros(size, np.float32)
            rows[:len(chosen)], chunk_labels[:len(chosen)] = chosen, flat[chosen]
            weights[:len(chosen)] = token_weight
            yield tuple(map(self.send, (rows, chunk_labels, weights)))


def _positions_within(segment_ids):
    """The position of each token in its document, 0 first: (B, S)."""
    places = np.arange(segment_ids.shape[1])
    starts = np.ones(segment_ids.shape, bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)


def total(losses):
    """The sum of a vector, in float64 and in one order: see `SquaredNorm`."""
    return float(losses.asnumpy().sum(dtype=np.float64))
