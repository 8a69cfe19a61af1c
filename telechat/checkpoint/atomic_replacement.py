"""Replacing the files of a directory all at once, or not at all."""

import contextlib
import json
import os
import shutil

from telechat.errors import InputError

_WRITING = ".telechat-writing"  # being filled; worth nothing
_COMPLETE = ".telechat-complete"  # whole and on disk; only to be moved into place
_STALE = ".stale.json"  # in the above: names that the new files make obsolete


@contextlib.contextmanager
def replace_atomically(directory, belongs):
    """Yield a temporary directory to fill; at the end its files become those of `directory`.

    A failure or a kill at any moment leaves the old files or the new ones, never a mixture: the
    new files are flushed to disk first, one rename then makes them count, and moving them into
    place is finished by whoever comes next (`finish_replacement`). Other files in `directory` stay.
    The temporary directory lies inside `directory`, so that a mount point, a symbolic link or the
    current directory can be written to.

    Args:
        directory: where the files shall be; created if need be.
        belongs: function of a file name: whether a file of `directory` is of what is replaced,
            so that it goes when no new file has its name.

    Raises:
        InputError: the directory cannot be written, or the disk is full.
    """
    directory = os.fspath(directory)
    writing = os.path.join(directory, _WRITING)
    existed = os.path.isdir(directory)
    try:
        os.makedirs(directory, exist_ok=True)
        finish_replacement(directory)
        if os.path.isdir(writing):  # left by a run that was killed
            shutil.rmtree(writing)
        os.mkdir(writing)
        yield writing
        new = os.listdir(writing)
        stale = [name for name in os.listdir(directory) if belongs(name) and name not in new]
        with open(os.path.join(writing, _STALE), "w", encoding="utf-8") as file:
            json.dump(stale, file)
        for name in os.listdir(writing):
            _sync(os.path.join(writing, name))
        _sync(writing)
        os.rename(writing, os.path.join(directory, _COMPLETE))
        _sync(directory)
        finish_replacement(directory)
    except BaseException as error:
        shutil.rmtree(writing, ignore_errors=True)
        if not existed:
            with contextlib.suppress(OSError):
                os.rmdir(directory)
        if isinstance(error, OSError):
            raise InputError(f"{directory} cannot be written ({error.strerror or error}); "
                             "free some space or give another directory") from error
        raise


def finish_replacement(directory):
    """Move into place what an interrupted `replace_atomically` had complete; do nothing where there is none."""
    complete = os.path.join(directory, _COMPLETE)
    if not os.path.isdir(complete):
        return
    manifest = os.path.join(complete, _STALE)
    # Several processes may do this at once: what is gone already, another one has moved.
    with contextlib.suppress(FileNotFoundError):
        with open(manifest, encoding="utf-8") as file:
            stale = json.load(file)
        for name in stale:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(directory, name))
        for name in os.listdir(complete):
            if name != _STALE:
                with contextlib.suppress(FileNotFoundError):
                    os.replace(os.path.join(complete, name), os.path.join(directory, name))
        _sync(directory)
        os.remove(manifest)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(complete)


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
