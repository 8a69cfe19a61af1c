"""Which conversations a dataset is made of: a mixture of weighted files, and the held-out part."""

import dataclasses
import math
import os
import random

from telechat.data.conversation import read_conversations
from telechat.errors import InputError
from telechat.text_files import expand_path

MAX_WEIGHT = 1000.0


@dataclasses.dataclass(frozen=True)
class MixtureFile:
    """One JSONL file and how many times its conversations are taken.

    Weight 2 takes each twice, 0.5 a random half, 1.5 each once and a random half again.
    """

    path: str
    weight: float = 1.0

    def __post_init__(self):
        if not 0 < self.weight <= MAX_WEIGHT:  # false for NaN too
            raise InputError(f"{self.path}: the weight must be above 0 and at most {MAX_WEIGHT:g}, "
                             f"not {self.weight:g}")


def parse_mixture_file(argument):
    """``FILE.jsonl`` or ``FILE.jsonl:WEIGHT`` as a `MixtureFile`.

    A file of exactly that name is taken as it is; otherwise a number behind the last colon is the
    weight.

    Raises:
        InputError: the weight is out of range.
    """
    argument = expand_path(argument)
    path, colon, weight = argument.rpartition(":")
    if colon and path and not os.path.exists(argument):
        try:
            weight_number = float(weight)
        except ValueError:
            if os.path.exists(path):
                raise InputError(f"{argument}: the weight behind the colon must be a number, "
                                 f"not {weight!r}") from None
        else:
            return MixtureFile(path, weight_number)
    return MixtureFile(argument)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Conversations and where they go.

    Attributes:
        conversations: list of conversations, as `read_conversations` gives them, files in the order
            given.
        train: list of int, indices into them in training order; weights make them repeat.
        evaluation: list of int, the held-out ones.
    """

    conversations: list
    train: list
    evaluation: list


def read_mixture(sources, seed, eval_share=0.0, tokens=(), system="refuse", template=None):
    """Read the files, hold some conversations out, take the rest by weight and shuffle.

    With one file of weight 1 and nothing held out, the order is that of ``random.seed(seed)`` and
    ``random.shuffle`` on the list of conversations, which is the incumbent's.

    Args:
        sources: list of `MixtureFile`.
        seed: int.
        eval_share: share of all conversations to hold out, at least one if above 0; held out
            before weights are applied, so none is in both parts.
        tokens, system, template: as in `read_conversations`.

    Raises:
        InputError: a file is bad, or nothing is left to train on.
    """
    if not 0 <= eval_share < 1:
        raise InputError(f"eval_share must be at least 0 and below 1, not {eval_share:g}")
    files = [read_conversations(source.path, tokens, system, template) for source in sources]
    conversations = [conversation for file in files for conversation in file]
    evaluation = []
    if eval_share:
        count = max(1, _round(eval_share * len(conversations)))
        evaluation = sorted(random.Random(f"{seed} held out").sample(range(len(conversations)), count))
    held_out = set(evaluation)
    train, first = [], 0
    for number, (source, file) in enumerate(zip(sources, files)):
        kept = [index for index in range(first, first + len(file)) if index not in held_out]
        first += len(file)
        whole = math.floor(source.weight)
        train += kept * whole
        part = _round((source.weight - whole) * len(kept))
        train += sorted(random.Random(f"{seed} file {number}").sample(kept, part))
    if not train:
        raise InputError("no conversation is left to train on; raise the weights, lower eval_share "
                         "or give more conversations")
    random.Random(seed).shuffle(train)
    return Mixture(conversations, train, evaluation)


def _round(value):
    return math.floor(value + 0.5)
