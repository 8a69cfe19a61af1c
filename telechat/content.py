"""What a file or directory is by its content, so that what was made of another is never taken up again."""

import hashlib
import os

from telechat.errors import InputError

# Of a file of weights not all is read: its beginning (the header of the format), its end, and blocks evenly between.
BLOCK, BLOCKS = 1 << 16, 64


def sampled_digest(path):
    """SHA-256, hexadecimal, over a file's size and up to 66 of its blocks of 64 KiB; a file no larger is read whole.

    A change of a weight in between goes unnoticed where it is alone; training and conversion change all of them.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(str(size).encode())
            if size <= BLOCK * (BLOCKS + 2):
                digest.update(file.read())
            else:
                for number in range(BLOCKS + 2):
                    file.seek((size - BLOCK) * number // (BLOCKS + 1))
                    digest.update(file.read(BLOCK))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()


def digest_of(path):
    """SHA-256, hexadecimal, of a whole file.

    Raises:
        InputError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()


def first_difference(name, before, here):
    """(name, before, here) of the first values that differ, looked for in dicts of dicts; None where all are equal.

    Args:
        name (str): of what is compared; names of fields within are put behind it with a dot.
        before, here: values as JSON gives them.
    """
    if before == here:
        return None
    if isinstance(before, dict) and isinstance(here, dict):
        for key in [*here, *(key for key in before if key not in here)]:
            found = first_difference(f"{name}.{key}", before.get(key), here.get(key))
            if found:
                return found
    return name, before, here
