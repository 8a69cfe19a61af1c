"""Writing a packed dataset: MindRecord files and the ``dataset.json`` that says what is in them."""

import hashlib
import itertools
import json
import os
import shutil

from telechat.checkpoint.atomic_replacement import replace_atomically
from telechat.content import sampled_digest
from telechat.errors import InputError

DATASET_JSON = "dataset.json"
COLUMNS = ("input_ids", "labels")
LENGTHS = "lengths"
_FORMAT = "telechat packed conversations"
_MEGABYTE = 1 << 20
_SMALL = 32 * _MEGABYTE
_ROWS = 256  # written in one call, which takes 0.6 ms whatever it writes


def record_file(split):
    """File name of a split ("train", "eval"); its index is beside it, with ".db" behind the name."""
    return f"{split}.mindrecord"


def belongs(name):
    """Whether a file name is one of a dataset directory."""
    return name == DATASET_JSON or name in {record_file(split) + suffix
                                            for split in ("train", "eval") for suffix in ("", ".db")}


def write_dataset(directory, splits, settings):
    """Write a dataset directory, whole or not at all; a dataset already there is replaced at the end.

    The MindRecord files have the columns ``input_ids`` and ``labels``, int32, (max_length + 1,), and
    ``lengths``, int32, those of the conversations that stand behind the padding.

    Args:
        directory: made if need be; files in it that are not a dataset's stay.
        splits: {"train": `Packing`} or {"train": `Packing`, "eval": `Packing`}.
        settings: dict, put into dataset.json as it is.

    Returns:
        the content of ``dataset.json``: format, settings, files (name → bytes), for each split its
        `Packing.counts` or null, sha256 (split → digest of its rows: ids, labels, lengths), and digests (name → that of
        the file, `sampled_digest`).

    Raises:
        InputError: the directory cannot be written or the disk is too full.
    """
    directory = os.path.realpath(directory)
    _check_space(directory, sum(_size_bound(packing, settings["max_length"]) for packing in splits.values()))
    with replace_atomically(directory, belongs) as writing:
        digests = {name: _write_split(os.path.join(writing, record_file(name)), packing, settings["max_length"],
                                      directory) for name, packing in splits.items()}
        info = {"format": _FORMAT, "settings": settings,
                **{name: splits[name].counts if name in splits else None for name in ("train", "eval")},
                "sha256": digests,
                "files": {name: os.path.getsize(os.path.join(writing, name))
                          for name in sorted(os.listdir(writing))},
                "digests": {name: sampled_digest(os.path.join(writing, name)) for name in sorted(os.listdir(writing))}}
        with open(os.path.join(writing, DATASET_JSON), "w", encoding="utf-8") as file:
            json.dump(info, file, ensure_ascii=False, indent=2)
            file.write("\n")
    return info


def _size_bound(packing, max_length):
    return len(packing) * (max_length + 1) * 8


def _write_split(path, packing, max_length, directory):
    """Write a file of rows; returns the SHA-256 of what they say."""
    from mindspore.mindrecord import FileWriter
    from mindspore.mindrecord.common.exceptions import MindRecordException

    try:
        writer = FileWriter(path, shard_num=1, overwrite=True)
        if _size_bound(packing, max_length) < _SMALL:
            # MindRecord's own sizes make a file of 48 MiB of the smallest dataset.
            row = (max_length + 1) * 8
            writer.set_header_size(1 << 16)
            writer.set_page_size(max(_MEGABYTE, 1 << (2 * row).bit_length()))
        writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in (*COLUMNS, LENGTHS)}, _FORMAT)
        rows = ({**dict(zip(COLUMNS, pack)), LENGTHS: lengths} for pack, lengths in zip(packing, packing.lengths()))
        digest = hashlib.sha256()
        while batch := list(itertools.islice(rows, _ROWS)):
            for row in batch:
                for name in (*COLUMNS, LENGTHS):
                    digest.update(row[name].astype("<i4", copy=False))
            writer.write_raw_data(batch)
        writer.commit()
    except (RuntimeError, MindRecordException) as error:
        raise InputError(f"{directory} cannot be written (MindSpore: {_reason(error)}); "
                         "free some space or give another directory") from error
    for name in (path, path + ".db"):
        os.chmod(name, 0o644)  # MindSpore lets only the owner read
    return digest.hexdigest()


def check_writable(directory):
    """Raise InputError where a directory can neither be written to nor be made."""
    existing = _existing(directory)
    if not os.path.isdir(existing):
        raise InputError(f"{existing} is a file; give a directory for the dataset")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{existing} cannot be written (permission denied); give another directory")


def _check_space(directory, size):
    free = shutil.disk_usage(_existing(directory)).free
    if size > free:
        raise InputError(f"{directory} needs up to {size / _MEGABYTE:.1f} MiB and the disk has "
                         f"{free / _MEGABYTE:.1f} MiB left; free some space or give another directory")


def _existing(path):
    """The path itself or the nearest of its parents that exists."""
    path = os.path.realpath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def _reason(error):
    """The one sentence in MindSpore's page of error text."""
    for line in str(error).splitlines():
        if line.startswith("[ERROR]"):
            return line.rpartition("] ")[2].strip().rstrip(".")
    return (str(error).splitlines() or ["unknown"])[0]
