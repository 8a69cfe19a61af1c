"""A checkpoint with feed-forward layers widened by zeros, where groups do not divide their width.

It computes the same: what is added to the width is SiLU(0)·0, and is multiplied by columns of zeros.
"""

import dataclasses

import numpy as np

from telechat.checkpoint import layout
from telechat.nn.quantised import CHUNK


def padded_config(config, group):
    """The config of a model whose feed-forward width is the next multiple of ``group`` inputs; of a chunk for -1."""
    multiple = CHUNK if group == -1 else group
    return dataclasses.replace(config, ffn_hidden_size=-(-config.ffn_hidden_size // multiple) * multiple)


class PaddedReader:
    """A `CheckpointReader` whose tensors are those of a wider config.

    Args:
        reader (CheckpointReader): of the model.
        config (TeleChatConfig): of `padded_config`.
    """

    def __init__(self, reader, config):
        self._reader = reader
        self._shapes = layout.parameter_shapes(config)
        self.config = config

    def read(self, name):
        """The tensor called ``name``, whole, in its own dtype."""
        array, shape = self._reader.read(name), self._shapes[name]
        if array.shape == shape:
            return array
        wider = np.zeros(shape, array.dtype)
        wider[tuple(map(slice, array.shape))] = array
        return wider
