"""From conversations to packs: rows of one length, each holding as many whole conversations as fit."""

import numpy as np

from telechat.data.encoding import IGNORED
from telechat.errors import InputError

OVERLONG = ("drop", "truncate")
MAX_LENGTH = 1 << 20


def check_settings(max_length, overlong):
    """Raise InputError unless these are settings that `Packing` takes."""
    if isinstance(max_length, bool) or not isinstance(max_length, int) or not 2 <= max_length <= MAX_LENGTH:
        raise InputError(f"max_length must be a whole number from 2 to {MAX_LENGTH}, not {max_length!r}")
    if overlong not in OVERLONG:
        raise InputError(f'overlong must be "drop" or "truncate", not {overlong!r}')


class Packing:
    """Conversations packed into rows of ``max_length + 1`` ids.

    In the order given, a conversation joins the current pack while the sum stays below
    max_length + 1, else it starts the next one; it is never cut over two packs. Packs are padded on
    the left with the pad token, labels -100. All packs but the last equal those of the incumbent's
    preprocessing, which loses the last, and of a format with a start token puts all of a pack's in front of its first
    conversation; here each stands at the beginning of its own.

    A conversation of more than max_length ids is dropped, or, with ``overlong="truncate"``, cut to
    its first max_length ids; if none of its answer is among those, it is dropped all the same.

    Iterating gives (input_ids, labels), int32 arrays (max_length + 1,), len() their number.

    Args:
        encoded: sequence of (input_ids, labels) as from `encode_conversations`.
        order: indices into it, the order of packing; may repeat.
        max_length: int.
        pad_id: int.
        overlong: "drop" or "truncate".

    Attributes:
        counts: dict for ``dataset.json``: conversations, dropped, truncated, packs, tokens (pads
            not counted), label_tokens (labels other than -100), padding_share.
    """

    def __init__(self, encoded, order, max_length, pad_id, overlong="drop"):
        check_settings(max_length, overlong)
        self._encoded, self._max_length, self._pad_id = encoded, max_length, pad_id
        self._packs = [[]]  # indices of the conversations in each
        dropped = truncated = tokens = label_tokens = length = 0
        for index in order:
            labels = encoded[index][1][:max_length]
            counted = np.count_nonzero(labels != IGNORED)
            is_long = len(encoded[index][1]) > max_length
            is_dropped = is_long and (overlong == "drop" or not counted)
            if length + (max_length + 1 if is_dropped else len(labels)) > max_length and self._packs[-1]:
                self._packs.append([])
                length = 0
            if is_dropped:
                dropped += 1
                continue
            self._packs[-1].append(index)
            length += len(labels)
            truncated += is_long
            tokens += len(labels)
            label_tokens += int(counted)
        if not self._packs[-1]:
            self._packs.pop()
        if not self._packs:
            raise InputError(f"none of the conversations is short enough for max_length {max_length}; "
                             'raise it, or give --overlong truncate')
        positions = len(self._packs) * (max_length + 1)
        self.counts = {
            "conversations": sum(map(len, self._packs)),
            "dropped": dropped,
            "truncated": truncated,
            "packs": len(self._packs),
            "tokens": tokens,
            "label_tokens": label_tokens,
            "padding_share": 1 - tokens / positions,
        }

    def __len__(self):
        return len(self._packs)

    def lengths(self):
        """The length of each conversation of each pack: int32 arrays, in the order of iteration."""
        for pack in self._packs:
            yield np.array([min(len(self._encoded[index][1]), self._max_length) for index in pack], np.int32)

    def __iter__(self):
        for pack in self._packs:
            input_ids = np.full(self._max_length + 1, self._pad_id, np.int32)
            labels = np.full(self._max_length + 1, IGNORED, np.int32)
            end = len(labels)
            for index in reversed(pack):
                ids, targets = (array[:self._max_length] for array in self._encoded[index])
                input_ids[end - len(ids):end] = ids
                labels[end - len(ids):end] = targets
                end -= len(ids)
            yield input_ids, labels
