"""Loss and gradients of one micro-batch, layer by layer through the compiled graphs."""

import mindspore as ms
import numpy as np
from mindspore import Tensor

from telechat.nn.dropout import dropout_mask
from telechat.nn.positions import causal_mask, sequence_tables
from telechat.training.graphs import Accumulate, BlockBackward, BlockForward, Embed, HeadLoss

# Logits made at a time, as rows × vocabulary: 16 MB in float32, so that a chunk stays near the caches
# while its products are still large; and the fewest rows of a chunk.
HEAD_LOGITS = 2 ** 22
HEAD_ROWS = 64


def head_rows(rows, vocab_size):
    """How many of ``rows`` rows of logits are made at a time."""
    return min(max(HEAD_LOGITS // vocab_size // HEAD_ROWS, 1) * HEAD_ROWS, rows)


class LossAndGradients:
    """Forward and backward passes of a model.

    Args:
        model (TeleChat): its parameters are read, never changed.
        seed (int): of the dropout masks.
        mask_padding (bool): whether pad tokens on the left of a sequence are hidden from attention.
    """

    def __init__(self, model, seed=0, mask_padding=False):
        self.model = model
        self.config = model.config
        self.seed = seed
        self.mask_padding = mask_padding
        functions = model.transformer.h[0].functions
        self.block_forward = BlockForward(functions)
        self.block_backward = BlockBackward(functions)
        self.embed = Embed(model.config, model.compute_dtype)
        self.head_loss = HeadLoss(model.config)
        self.add = Accumulate()
        self._positions = {}

    def loss(self, input_ids, labels, token_weight):
        """Loss without dropout and without gradients; arguments as in `__call__`."""
        x, _ = self._forward(input_ids, self._tables(input_ids), lambda layer: (None, None, None), None, keep=False)
        return sum(self.head_loss(x, *chunk, *self._head_weights()) for chunk in self._chunks(labels, token_weight))

    def __call__(self, input_ids, labels, token_weight, step=0, micro_batch=0):
        """Weighted loss and its gradients.

        Args:
            input_ids (array): int32 (B, S).
            labels (array): int32 (B, S): the token that each position is to predict, -100 for none.
            token_weight (float): weight of each counted token: 1 / their number in the whole batch.
            step, micro_batch (int): which dropout masks are drawn.

        Returns:
            (Tensor, list): the loss, float32 scalar, and the gradients as groups of tensors, in the
            order of `parameter_groups`.
        """
        batch, length = input_ids.shape
        embed_drop = self._drop((batch * length, self.config.hidden_size), self.config.embedding_dropout,
                                step, micro_batch, self.config.n_layer, 0)

        def drops(layer):
            return self._block_drops(batch, length, step, micro_batch, layer)

        tables = self._tables(input_ids)
        x, kept = self._forward(input_ids, tables, drops, embed_drop, keep=True)
        loss, dx, head_grads = self._head(x, labels, token_weight)
        groups = []
        for layer in reversed(range(self.config.n_layer)):
            block = self.model.transformer.h[layer]
            dx, *grads = self.block_backward(dx, *kept.pop(), *tables, *drops(layer),
                                             *_data(block.weights()))
            groups.append(grads)
        weight = self.model.transformer.word_embeddings.weight.data
        dembedding = self.embed.backward(dx, Tensor(input_ids.reshape(-1)), embed_drop, weight)
        if self.model.lm_head is None:
            dembedding, = self.add(dembedding, head_grads.pop())
        return loss, [[dembedding], *reversed(groups), head_grads]

    def parameter_groups(self):
        """The model's parameters grouped as the gradients are: embedding, each block, the rest."""
        model = self.model
        blocks = [[p for p in block.weights() if p is not None] for block in model.transformer.h]
        rest = [model.transformer.ln_f.weight] + ([] if model.lm_head is None else [model.lm_head.weight])
        return [[model.transformer.word_embeddings.weight], *blocks, rest]

    def _forward(self, input_ids, tables, drops, embed_drop, keep):
        weight = self.model.transformer.word_embeddings.weight.data
        x = self.embed(Tensor(input_ids.reshape(-1)), embed_drop, weight)
        kept = []
        for layer, block in enumerate(self.model.transformer.h):
            y, *inputs = self.block_forward(x, *tables, *drops(layer), *_data(block.weights()))
            if keep:
                kept.append([x, *inputs])
            x = y
        return x, kept

    def _head(self, x, labels, token_weight):
        loss, gradients = None, None
        for chunk in self._chunks(labels, token_weight):
            chunk_loss, *chunk_gradients = self.head_loss.backward(x, *chunk, *self._head_weights())
            if gradients is None:
                loss, gradients = chunk_loss, chunk_gradients
            else:
                loss, *gradients = self.add(loss, *gradients, chunk_loss, *chunk_gradients)
        dx, *head_gradients = gradients
        return loss, dx, head_gradients

    def _head_weights(self):
        return self.model.transformer.ln_f.weight.data, self.model.head_weight.data

    def _tables(self, input_ids):
        """cos, sin and mask for a micro-batch; kept while the length stays the same."""
        length = input_ids.shape[1]
        if length not in self._positions:
            tables = (*sequence_tables(self.config, length), causal_mask(self.config, length))
            self._positions = {length: tuple(map(Tensor, tables))}
        cos, sin, mask = self._positions[length]
        if self.mask_padding:
            # Only pads before the first other token: a pad id further on was put there by the data.
            shown = np.cumsum(input_ids != self.config.pad_token_id, axis=1) > 0
            mask = Tensor(causal_mask(self.config, length, shown))
        return cos, sin, mask

    def _block_drops(self, batch, length, step, micro_batch, layer):
        config = self.config
        hidden = (batch * length, config.hidden_size)
        return (self._drop((batch, config.n_head, length, length), config.attention_dropout,
                           step, micro_batch, layer, 0),
                self._drop(hidden, config.hidden_dropout, step, micro_batch, layer, 1),
                self._drop(hidden, config.hidden_dropout, step, micro_batch, layer, 2))

    def _drop(self, shape, rate, step, micro_batch, layer, site):
        mask = dropout_mask(shape, rate, self.seed, step, micro_batch, layer, site)
        return None if mask is None else Tensor(mask)

    def _chunks(self, labels, token_weight):
        """The counted rows of ``labels`` in chunks of one fixed size, filled up with rows of weight 0."""
        flat = labels.reshape(-1)
        size = head_rows(flat.size, self.config.vocab_size)
        counted = np.flatnonzero(flat >= 0).astype(np.int32)
        for start in range(0, max(len(counted), 1), size):
            chosen = counted[start:start + size]
            rows, chunk_labels = np.zeros(size, np.int32), np.zeros(size, np.int32)
            weights = np.zeros(size, np.float32)
            rows[:len(chosen)], chunk_labels[:len(chosen)] = chosen, flat[chosen]
            weights[:len(chosen)] = token_weight
            yield Tensor(rows), Tensor(chunk_labels), Tensor(weights)


def _data(parameters):
    return [None if parameter is None else parameter.data for parameter in parameters]
