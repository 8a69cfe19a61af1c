"""Whether what a tool is about to do fits into main memory and onto the disk, told before weights are read.

Linux promises memory that it has not got and ends a process without a word when it is written to: a run that does not
fit is noticed minutes or hours later, by its absence.
"""

import ctypes
import os
import shutil
import sys

from telechat.errors import InputError

# Where the limits of control groups (containers, Slurm jobs) are, version 2 and 1: the mounted folder, the field of
# /proc/self/cgroup that names the process's own group, its files of limit and use, and the lines of memory.stat that
# count the page cache, which the kernel gives back.
CONTROL_GROUPS = (("/sys/fs/cgroup", "", "memory.max", "memory.current", ("inactive_file", "active_file")),
                  ("/sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                   ("total_inactive_file", "total_active_file")))


def release_freed():
    """Give memory that was freed back to the system, of which glibc keeps up to 64 MB; elsewhere nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_bytes(meminfo="/proc/meminfo", own_groups="/proc/self/cgroup", control_groups=CONTROL_GROUPS):
    """Bytes of main memory that a program may still take, page cache included; None where the system does not say.

    The least of what the machine has and what each control group that the process is in still allows.
    """
    try:
        with open(meminfo, encoding="ascii") as file:
            values = dict(line.split(":", 1) for line in file)
        available = int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return None
    for root, controller, *files in control_groups:
        # In a container the own group is often the root of what is mounted, whatever /proc calls it.
        for folder in {root, *_own_folders(root, controller, own_groups)}:
            left = _left(folder, *files)
            available = available if left is None else min(available, left)
    return max(available, 0)


def _own_folders(root, controller, own_groups):
    """The folders of the process's control group and of those around it."""
    try:
        with open(own_groups, encoding="utf-8") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        if len(line) == 3 and controller in line[1].split(","):
            names = [name for name in line[2].split("/") if name]
            for count in range(1, len(names) + 1):
                yield os.path.join(root, *names[:count])


def _left(folder, limit, used, cached):
    """Bytes that a control group still allows; None where it has no limit or is none."""
    try:
        with open(os.path.join(folder, limit), encoding="ascii") as first:
            most = int(first.read())
        with open(os.path.join(folder, used), encoding="ascii") as second:
            taken = int(second.read())
    except (OSError, ValueError):
        return None  # no such version, or "max": no limit
    try:
        with open(os.path.join(folder, "memory.stat"), encoding="ascii") as file:
            counts = dict(line.split() for line in file)
        taken -= sum(int(counts.get(name, 0)) for name in cached)
    except (OSError, ValueError):
        pass
    return most - taken


def check_memory(parts, what, lower, available, ignore=False):
    """Raise InputError where more memory is needed than there is.

    Args:
        parts (dict): what it is needed for → bytes; of all processes on this machine together.
        what (str): needs it, e.g. "training".
        lower (str): what the user may change.
        available (int): bytes, of `available_bytes`; None: unknown, nothing is refused.
        ignore (bool): warn on stderr instead.
    """
    needed = sum(parts.values())
    if available is None or needed <= available:
        return
    shown = ", ".join(f"{name} {gigabytes(size)}" for name, size in
                      sorted(parts.items(), key=lambda item: -item[1]) if size >= needed / 100)
    text = (f"{what} needs about {gigabytes(needed)} GB of memory ({shown}), and {gigabytes(available)} GB are available")
    if not ignore:
        raise InputError(f"{text}: {lower}, or give --ignore_memory to try it all the same")
    print(f"warning: {text}; going on as --ignore_memory says", file=sys.stderr, flush=True)


def gigabytes(size):
    """Bytes in GB, with a decimal or two digits."""
    return f"{size / 1e9:,.1f}" if size >= 1e9 else f"{size / 1e9:.2g}"


def check_disk(directory, needed, what, lower, ignore=False):
    """Raise InputError where a file system has not as many bytes left as are to be written.

    Args:
        directory (str): where they go; it need not exist.
        needed (int): bytes.
        what (str): is written.
        lower (str): what the user may do besides freeing space.
        ignore (bool): warn on stderr instead.
    """
    there = os.path.abspath(directory)
    while not os.path.isdir(there):
        there = os.path.dirname(there)
    try:
        free = shutil.disk_usage(there).free
    except OSError:
        return
    if needed <= free:
        return
    text = f"{what} will take {gigabytes(needed)} GB in {directory}, where {gigabytes(free)} GB are free"
    if not ignore:
        raise InputError(f"{text}: free space, {lower}, or give --ignore_memory to start all the same")
    print(f"warning: {text}; going on as --ignore_memory says", file=sys.stderr, flush=True)
