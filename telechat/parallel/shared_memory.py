"""Memory that the processes of one host share."""

import mmap
import os
import tempfile

from telechat.parallel.collectives import gather_objects

FOLDER = "/dev/shm"  # files there are memory; elsewhere they are too while they are mapped, but may be written to a disk


def share_memory(size, group):
    """``size`` bytes of zeros that all processes of ``group`` see: an `mmap.mmap`; None where they are on several hosts.

    Every process calls it. Nothing is left behind, even by processes that are killed.
    """
    path = memory = None
    if group.rank == 0:
        path, memory = _create(size)
    path = gather_objects(path, group)[0]
    if path is not None and group.rank != 0:
        memory = _open(path, size)
    everywhere = all(gather_objects(memory is not None, group))
    if group.rank == 0 and path is not None:
        os.remove(path)
    return memory if everywhere else None


def _create(size):
    """A new file's path and its memory; two times None where there is no room for it."""
    try:
        file, path = tempfile.mkstemp(prefix="telechat-", dir=FOLDER if os.access(FOLDER, os.W_OK) else None)
    except OSError:
        return None, None
    try:
        os.posix_fallocate(file, 0, size)  # what is missing shows here, and not when it is written to
        return path, mmap.mmap(file, size)
    except OSError:
        os.remove(path)
        return None, None
    finally:
        os.close(file)


def _open(path, size):
    """The memory of another process's file; None where it is on another host."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        return mmap.mmap(file, size)
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)
