"""Whole sequences through a model, several at a time, for what their next tokens and losses are."""

import numpy as np
from mindspore import Tensor, ops

from telechat.data.encoding import IGNORED
from telechat.nn.positions import sequence_tables

ROWS = 256  # positions whose logits are held at a time: a vocabulary of 160,000 makes that 160 MB
MULTIPLE = 32  # lengths are filled up to a multiple of this


class Forward:
    """Computes sequences of at most ``training_seqlen`` tokens, where rotary tables do not depend on the length.

    Filling stands behind a sequence, where the causal mask hides it, so it changes nothing.

    Args:
        model (TeleChat or TensorParallelModel): the model.
    """

    def __init__(self, model):
        self.model = model

    def last_logits(self, sequences):
        """The logits of the token after each sequence: float32 (len(sequences), V)."""
        x, length = self._hidden(sequences)
        rows = [number * length + len(ids) - 1 for number, ids in enumerate(sequences)]
        return self.model.head(ops.gather(x, Tensor(np.array(rows, np.int32)), 0)).asnumpy()

    def losses(self, sequences, labels):
        """Summed cross entropy of each sequence and over how many tokens: two float64 arrays.

        Args:
            sequences, labels (lists of lists of int): of equal lengths; a label is -100 where the token does
                not count, and token t is predicted from those before it.
        """
        x, length = self._hidden([ids[:-1] for ids in sequences])
        targets = np.full((len(sequences), length), IGNORED)
        for number, wanted in enumerate(labels):
            targets[number, :len(wanted) - 1] = wanted[1:]
        counted = np.flatnonzero(targets.reshape(-1) != IGNORED)
        sums = np.zeros(len(sequences))
        for first in range(0, len(counted), ROWS):
            rows = counted[first:first + ROWS]
            # One shape for all but the head's own rows: the last part repeats its last row.
            filled = np.concatenate([rows, np.full(min(ROWS, len(counted)) - len(rows), rows[-1])])
            logits = self.model.head(ops.gather(x, Tensor(filled.astype(np.int32)), 0)).asnumpy()[:len(rows)]
            logits = logits.astype(np.float64)
            top = logits.max(axis=1)
            normaliser = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
            loss = normaliser - logits[np.arange(len(rows)), targets.reshape(-1)[rows]]
            np.add.at(sums, rows // length, loss)
        return sums, (targets != IGNORED).sum(axis=1)

    def _hidden(self, sequences):
        """After the last block: (B·length, H), and length."""
        config = self.model.config
        length = -(-max(map(len, sequences)) // MULTIPLE) * MULTIPLE
        length = min(length, max(config.training_seqlen, max(map(len, sequences))))
        ids = np.zeros((len(sequences), length), np.int32)
        for number, sequence in enumerate(sequences):
            ids[number, :len(sequence)] = sequence
        kernels = self.model.kernels
        cos, sin = map(kernels.rotary_tensor, sequence_tables(config, length))
        visible = kernels.attention_tensors(config, length, heads=self.model.own_heads)
        x = self.model.embed(Tensor(ids))
        for block in self.model.transformer.h:
            x = block(x, cos, sin, visible)
        return x, length
