"""PackedDataset: what `tools/preprocess.py` wrote, as batches for training and evaluation."""

import itertools
import json
import os
import shlex

import numpy as np

from telechat.checkpoint.atomic_replacement import finish_replacement
from telechat.content import sampled_digest
from telechat.data.encoding import IGNORED
from telechat.data.mindrecord import COLUMNS, DATASET_JSON, LENGTHS, record_file
from telechat.errors import InputError
from telechat.text_files import read_json_object

_AGAIN = "run tools/preprocess.py again"
_WANTED = "give a directory that tools/preprocess.py wrote"


class PackedDataset:
    """Batches of one split of a dataset directory, read with MindSpore's MindDataset.

    The packs of one epoch after another form one endless sequence, which is cut into batches: a
    batch may hold the end of one epoch and the beginning of the next, and no pack is ever left out.
    The order within an epoch is a function of seed and epoch alone.

    Args:
        directory: written by `write_dataset` (tools/preprocess.py).
        batch_size: packs in a global batch, over all shards.
        seed: 0 to 2**32 - 1.
        split: "train" or "eval".
        shuffle: False: the order of the file in every epoch.
        num_shards: number of data-parallel ranks, a divisor of batch_size; global batches do not
            depend on it.
        segment_ids: whether batches say which conversation each token belongs to.
        shard_id: which of their rows are read here: batch_size / num_shards of them, from
            shard_id · batch_size / num_shards.

    Attributes:
        info: dict, the content of ``dataset.json``.
        max_length: the rows hold one id more.
        num_packs: rows of the split.
        steps_per_epoch: batches that it takes to have seen every pack, ceil(num_packs / batch_size).

    Raises:
        InputError: the directory is no dataset, or a truncated or mixed one, or has no such split.
    """

    def __init__(self, directory, batch_size, seed=0, split="train", shuffle=True, num_shards=1, shard_id=0,
                 segment_ids=False):
        _check_whole("batch_size", batch_size, 1)
        _check_whole("seed", seed, 0, 2**32 - 1)
        _check_whole("num_shards", num_shards, 1)
        _check_whole("shard_id", shard_id, 0, num_shards - 1)
        if batch_size % num_shards:
            raise InputError(f"batch_size {batch_size} must be a multiple of the {num_shards} "
                             "data-parallel ranks")
        self._directory = os.fspath(directory)
        self.info = _read_info(self._directory)
        if split not in ("train", "eval"):
            raise InputError(f'split must be "train" or "eval", not {split!r}')
        if self.info[split] is None:
            raise InputError(f"{directory} has no held-out part; {_AGAIN} with --eval_share")
        self._file = os.path.join(self._directory, record_file(split))
        self._batch_size, self._seed, self._shuffle = batch_size, seed, shuffle
        self._shard_size = batch_size // num_shards
        self._shard_id = shard_id
        self._segment_ids = segment_ids
        self._pad_id = self.info["settings"]["tokens"]["pad"]["id"]
        self.max_length = self.info["settings"]["max_length"]
        self.num_packs = self.info[split]["packs"]
        self.steps_per_epoch = -(-self.num_packs // batch_size)
        next(self._rows([0]))  # a file that cannot be read is better known of now

    def batches(self, start_step=0):
        """Endless iterator over the batches from step ``start_step`` (counted from 0) on.

        ``batches(k)`` gives what an iterator from 0 gives after k batches, without reading those.

        Yields:
            (input_ids, labels), int32 numpy arrays (batch_size / num_shards, max_length + 1); labels
            equal the input where the loss counts, else -100, and are not shifted. With ``segment_ids`` a
            third of that shape: 0 for padding, then 1, 2, … for the conversations of a row.
        """
        _check_whole("start_step", start_step, 0)
        rows = self._training_rows(start_step * self._batch_size)
        while True:
            yield _stack(itertools.islice(rows, self._shard_size))

    def _training_rows(self, start):
        """This shard's rows of the endless sequence, from global position ``start`` on."""
        for epoch in itertools.count(start // self.num_packs):
            first = epoch * self.num_packs
            positions = np.arange(max(first, start), first + self.num_packs)
            mine = positions[positions % self._batch_size // self._shard_size == self._shard_id]
            if len(mine):
                yield from self._rows(self._order(epoch)[mine - first])

    def _order(self, epoch):
        if not self._shuffle:
            return np.arange(self.num_packs)
        # RandomState's streams are frozen; those of numpy's newer generators may change with numpy.
        return np.random.RandomState([self._seed, epoch]).permutation(self.num_packs)

    def evaluation_batches(self):
        """One pass over the split in the file's order.

        Yields:
            as `batches`; what is missing in the last batch is filled with rows of pad tokens whose
            labels are all -100, so that every batch has one shape and every shard as many.
        """
        for step in range(self.steps_per_epoch):
            first = step * self._batch_size + self._shard_id * self._shard_size
            indices = range(first, min(first + self._shard_size, self.num_packs))
            rows = list(self._rows(indices)) if indices else []
            filling = (np.full(self.max_length + 1, self._pad_id, np.int32),
                       np.full(self.max_length + 1, IGNORED, np.int32),
                       *([np.zeros(self.max_length + 1, np.int32)] if self._segment_ids else []))
            yield _stack(rows + [filling] * (self._shard_size - len(rows)))

    def identity(self):
        """What the data is by content, to be compared with `same_data`: JSON of settings, counts and digests.

        Where the dataset and its tokenizer lie is no part of it.
        """
        settings = self.info["settings"]
        about = {name: settings.get(name) for name in ("max_length", "tokens", "sources", "seed", "eval_share", "overlong")}
        about["tokenizer"] = settings["tokenizer"].get("sha256", settings["tokenizer"]["vocab_size"])
        about.update({split: self.info[split] for split in ("train", "eval")})
        digests = self.info.get("sha256")
        if digests is None:  # written by a version that did not note them
            digests = {split: sampled_digest(os.path.join(self._directory, record_file(split)))
                       for split in ("train", "eval") if self.info[split]}
        return json.loads(json.dumps({**about, "sha256": digests}))

    def check_fits(self, vocab_size, sequence_length):
        """Check the dataset against a model before training starts.

        Args:
            vocab_size: rows of the model's embedding.
            sequence_length: tokens that the model is trained on at a time.

        Raises:
            InputError: the dataset was made for another sequence length, or with a tokenizer that
                has more tokens than the model has rows.
        """
        if self.max_length != sequence_length:
            raise InputError(
                f"{self._directory} holds sequences of {self.max_length} tokens and the run is set to "
                f"{sequence_length}; {_AGAIN} with --max_length {sequence_length} or change the run's "
                "sequence length")
        tokenizer = self.info["settings"]["tokenizer"]
        if tokenizer["vocab_size"] > vocab_size:
            raise InputError(
                f"{self._directory} was made with a tokenizer of {tokenizer['vocab_size']} tokens and the "
                f"model's embedding has {vocab_size} rows; {_AGAIN} with the model's own tokenizer")

    def check_tokenizer(self, tokenizer):
        """Raise InputError where the ids were made by another tokenizer than ``tokenizer``, and so mean other texts."""
        made_with = self.info["settings"]["tokenizer"].get("sha256")
        if made_with not in (None, tokenizer.sha256):
            raise InputError(f"{self._directory} was made with another tokenizer than {tokenizer.path}, which goes with the "
                             f"model; {_AGAIN} with --vocab_file_path {shlex.quote(tokenizer.path)}")

    def _rows(self, indices):
        """(input_ids, labels) of the rows with these indices, in this order."""
        import mindspore.dataset

        try:
            dataset = mindspore.dataset.MindDataset(
                self._file, columns_list=[*COLUMNS, *([LENGTHS] if self._segment_ids else [])], num_parallel_workers=1,
                sampler=mindspore.dataset.SubsetSampler([int(index) for index in indices]))
            for row in dataset.create_dict_iterator(num_epochs=1, output_numpy=True):
                input_ids, labels = (row[name] for name in COLUMNS)
                for column in (input_ids, labels):
                    if column.shape != (self.max_length + 1,) or column.dtype != np.int32:
                        raise InputError(
                            f"{self._file} is a wrong or mixed dataset: a row is {column.dtype} of shape "
                            f"{column.shape} where {DATASET_JSON} says int32 of ({self.max_length + 1},); "
                            f"{_AGAIN}")
                if self._segment_ids:
                    yield input_ids, labels, self._numbers(row[LENGTHS])
                else:
                    yield input_ids, labels
        except (RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            columns = (*COLUMNS, LENGTHS) if self._segment_ids else COLUMNS
            raise InputError(f"{self._file} cannot be read as MindRecord with the columns "
                             f"{' and '.join(columns)}; {_AGAIN}") from error

    def _numbers(self, lengths):
        """Which conversation each position of a row belongs to."""
        padding = self.max_length + 1 - int(lengths.sum())
        return np.repeat(np.arange(len(lengths) + 1, dtype=np.int32), [padding, *lengths])


def same_data(one, other):
    """Whether two `PackedDataset.identity` are of the same rows, whatever the files and settings they came from."""
    return one.get("sha256") is not None and one["sha256"] == other["sha256"]


def _check_whole(name, value, low, high=None):
    in_range = isinstance(value, int) and value >= low and (high is None or value <= high)
    if isinstance(value, bool) or not in_range:
        bounds = f"from {low} to {high}" if high is not None else f"of {low} or more"
        raise InputError(f"{name} must be a whole number {bounds}, not {value!r}")


def _stack(rows):
    return tuple(map(np.stack, zip(*rows)))


def _read_info(directory):
    """The checked content of ``dataset.json``, with the sizes of the files compared."""
    path = os.path.join(directory, DATASET_JSON)
    try:
        if os.path.isdir(directory):
            finish_replacement(directory)
    except OSError as error:
        raise InputError(f"{directory} cannot be read ({error.strerror}); {_WANTED}") from None
    info = read_json_object(path, _WANTED)
    try:
        complete = (isinstance(info["settings"]["max_length"], int)
                    and isinstance(info["settings"]["tokens"]["pad"]["id"], int)
                    and isinstance(info["settings"]["tokenizer"]["vocab_size"], int)
                    and isinstance(info["train"]["packs"], int)
                    and (info["eval"] is None or isinstance(info["eval"]["packs"], int)))
        files, digests = dict(info["files"]), dict(info.get("digests", {}))  # the latter: none in older datasets
    except (KeyError, TypeError, ValueError):
        complete = False
    if not complete:
        raise InputError(f"{path} does not describe a dataset; {_AGAIN}")
    for name, size in files.items():
        file = os.path.join(directory, name)
        actual = os.path.getsize(file) if os.path.isfile(file) else None
        if actual is None:
            raise InputError(f"{file} is missing; {_AGAIN}")
        if actual != size:
            raise InputError(f"{file} has {actual} bytes and not the {size} that {DATASET_JSON} says: the "
                             f"dataset is truncated, or mixed from two; {_AGAIN}")
        # MindSpore does not read a damaged file as such: it ends the process, or gives other rows.
        if name in digests and digests[name] != sampled_digest(file):
            raise InputError(f"{file} is damaged or from another dataset: its bytes are not those that {DATASET_JSON} was "
                             f"written for; copy it again, or {_AGAIN}")
    return info
