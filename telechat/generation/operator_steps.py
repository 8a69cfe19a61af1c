"""Prompts and new tokens through a model by one operator for the whole of it (telechat/nn/cpu)."""

import numpy as np

from telechat.nn.block import without_adapters
from telechat.progress import track

ROWS = 512  # tokens of a call: more take memory, fewer read the weights more often


class OperatorSteps:
    """As `GraphSteps`, with nothing to compile. What a token gets does not depend on what is computed with it.

    Args:
        model (TeleChat): whose weights are all here.
        step (DecodeStep): of its kernels.
        tables (tuple): of `decoding_tables`, or None where ALiBi is used.
        adapters (AdapterSet): as of `GraphSteps`.
    """

    uncompiled = ()

    def __init__(self, model, step, tables, adapters=None):
        self.model = model
        self.cache = None
        self._step = step
        self._tables = tables
        self._adapters = adapters
        self._places = None  # of the layers' weights, once they are asked for without adapters
        self._products = [product for block in model.transformer.h for product in block.products()]

    def use(self, cache):
        """As `GraphSteps.use`."""
        self.cache = cache

    def takes_together(self, counts):
        """As `GraphSteps.takes_together`."""
        return sum(counts) <= ROWS

    def prefill(self, slots, chunks, starts, rotations, columns=None):
        """As `GraphSteps.prefill`."""
        sequences = np.repeat(np.arange(len(slots)), [len(chunk) for chunk in chunks])
        tokens = np.concatenate([np.asarray(chunk, np.int32) for chunk in chunks])
        positions = np.concatenate([np.arange(start, start + len(chunk)) for start, chunk in zip(starts, chunks)])
        rotation = None if self._tables is None else [np.concatenate(parts) for parts in zip(*rotations)]
        last = np.flatnonzero(np.append(sequences[1:] != sequences[:-1], True))
        firsts = range(0, len(tokens), ROWS)
        columns = None if columns is None else columns[sequences]
        logits = [self._run(slots, sequences, tokens, positions, rotation, columns, slice(first, first + ROWS), last)
                  for first in (track(firsts, "reading a prompt", "parts") if len(firsts) > 1 else firsts)]
        return np.concatenate(logits)

    def decode(self, slots, tokens, positions, columns=None):
        """As `GraphSteps.decode`."""
        rotation = None if self._tables is None else [table[list(positions)] for table in self._tables]
        every = np.arange(len(tokens))
        return self._run(slots, every, np.asarray(tokens), np.asarray(positions), rotation, columns, slice(None), every)

    def _run(self, slots, sequences, tokens, positions, rotation, columns, rows, outputs):
        """Some rows of a call, and the logits of those of them that are among ``outputs``."""
        model, transformer = self.model, self.model.transformer
        first = rows.start or 0
        wanted = outputs[(outputs >= first) & (outputs < first + len(tokens[rows]))] - first
        rotation = None if rotation is None else [part[rows] for part in rotation]
        blocks, attached = self._weights()
        adapters = None if columns is None else (columns[rows], self._adapters.layers)
        if attached is not None:  # an adapter that all tokens take
            rank = max(factor.shape[0] for layer in attached for factor in layer[::2] if factor is not None)
            adapters = np.ones((len(tokens[rows]), rank), np.float32), attached
        return self._step(self.cache.table.table[list(slots)], sequences[rows], tokens[rows], positions[rows], rotation,
                          wanted, transformer.word_embeddings.weight, transformer.ln_f.weight, model.head_weight,
                          blocks, [layer[2:] for layer in self.cache.layers], adapters)

    def _weights(self):
        """What `without_adapters` gives of all layers: their weights, and their factors, or None where there are none."""
        if any(product.adapter is not None for product in self._products):
            return list(zip(*(without_adapters(block.weights()) for block in self.model.transformer.h)))
        if self._places is None:
            self._places = [places_of(block) for block in self.model.transformer.h]
        return [[find(place) for place in places] for places in self._places], None


def places_of(block):
    """Where MindSpore holds what `Block.weights` gives; `find` takes it from there, as it is by then.

    A Cell's own look-up of its attributes takes 0.1 of the 3 ms of a small model's token, this one 0.01.
    """
    held = {id(parameter): (cell._params, name) for _, cell in block.cells_and_names() for name, parameter in cell._params.items()}

    def place(weight):
        if weight is None:
            return None
        return list(map(place, weight)) if isinstance(weight, tuple) else held[id(weight)]

    return list(map(place, block.weights()))


def find(place):
    """What is at a place of `places_of` now."""
    if place is None:
        return None
    if isinstance(place, list):
        return tuple(map(find, place))
    parameters, name = place
    return parameters[name]
