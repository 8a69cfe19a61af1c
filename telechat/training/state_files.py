"""The files in which the processes of a run have each written their part of what goes on with it."""

import json
import os

import numpy as np
from safetensors import SafetensorError, safe_open

from telechat.errors import InputError


class StateFiles:
    """The state files of a checkpoint, opened together: what each holds, and reads across them.

    Args:
        folder (str): theirs.

    Raises:
        InputError: a file cannot be read.
    """

    def __init__(self, folder):
        self._folder = folder
        self._pieces = {}  # key → list of (file, box)
        self._handles = {}
        for name in sorted(os.listdir(folder)):
            if name.endswith(".safetensors"):
                file = os.path.join(folder, name)
                try:
                    handle = safe_open(file, "np")
                    boxes = json.loads(handle.metadata()["boxes"])
                except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
                    raise InputError(f"{file} cannot be read ({error}); resume from another checkpoint") from None
                self._handles[file] = handle
                for key, box in boxes.items():
                    self._pieces.setdefault(key, []).append((file, box))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._handles.clear()

    def check_complete(self, shapes):
        """InputError unless every kind of state is there for every parameter (name → shape), all of its values."""
        kinds = {key.partition(".")[0] for key in self._pieces}
        if not kinds:
            raise InputError(f"{self._folder} holds no state of the optimizer; resume from another checkpoint")
        for key in (f"{kind}.{name}" for kind in sorted(kinds) for name in shapes):
            found = sum(int(np.prod([stop - start for start, stop in box])) for _, box in self._pieces.get(key, ()))
            wanted = int(np.prod(shapes[key.partition(".")[2]]))
            if found != wanted:
                raise InputError(f"{self._folder} lacks a part of {key} (found {found:,} of {wanted:,} values); "
                                 "copy the rank files of all nodes together, or resume from another checkpoint")

    def read_into(self, target, key, box):
        """Fill ``target``, which lies at ``box`` of the whole tensor, from the pieces that overlap it.

        target (array): of the tensor ``key``; box: (start, stop) an axis. Raises InputError where pieces are missing.
        """
        filled = 0
        for file, piece in self._pieces.get(key, ()):
            overlap = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, piece)]
            if any(start >= stop for start, stop in overlap):
                continue
            there = tuple(slice(start - origin, stop - origin) for (start, stop), (origin, _) in zip(overlap, piece))
            here = tuple(slice(start - origin, stop - origin) for (start, stop), (origin, _) in zip(overlap, box))
            target[here] = self._handles[file].get_slice(key)[there]
            filled += int(np.prod([stop - start for start, stop in overlap]))
        if filled != target.size:
            raise InputError(f"{self._folder} lacks a part of {key} (found {filled:,} of {target.size:,} values); "
                             "copy the rank files of all nodes together, or resume from another checkpoint")
