"""The key that clients must send: where it is given, and how it stays secret."""

import ctypes
import os
import sys

from telechat.errors import InputError

VARIABLE = "TELECHAT_API_KEY"
LONGEST = 4096  # characters


def read_api_key(given, path, environment=os.environ):
    """The key of ``--api_key``, of the file of ``--api_key_file`` or of the variable TELECHAT_API_KEY; None for none.

    Args:
        given (str): on the command line.
        path (str): of a file with the key in its only line.
        environment (dict): variables; a flag goes before them.

    Raises:
        InputError: there are two flags, the file cannot be read, or what it holds is no key. The key is not in
            the message.
    """
    if given is not None and path is not None:
        raise InputError("give --api_key or --api_key_file, not both")
    if path is not None:
        return _checked(_read(path), f"--api_key_file {path}")
    if given is not None:
        return _checked(given, "--api_key")
    if VARIABLE in environment:
        return _checked(environment[VARIABLE], f"the variable {VARIABLE}")
    return None


def _read(path):
    try:
        with open(path, "rb") as file:
            data = file.read(4 * LONGEST)
    except OSError as error:
        raise InputError(f"--api_key_file {path} cannot be read ({error.strerror}); give a file with the key in its "
                         "only line") from None
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise InputError(f"--api_key_file {path} is not text; give a file with the key in its only line") from None


def _checked(key, source):
    if not (key.isascii() and key.isprintable() and key.strip() == key and 0 < len(key) <= LONGEST):
        raise InputError(f"{source} must be one line of printable ASCII characters, without spaces around them and not "
                         "empty")
    return key


def hide_argument(secret):
    """Overwrite a command-line argument, so that neither ``ps`` nor a traceback's file shows it.

    Linux shows the memory that the arguments lie in (/proc/self/stat, fields 48 and 49); elsewhere nothing is done.
    """
    sys.argv = [argument.replace(secret, "…") for argument in sys.argv]
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            start, end = map(int, file.read().rpartition(")")[2].split()[45:47])
        with open("/proc/self/cmdline", "rb") as file:
            shown = file.read()
    except (OSError, ValueError):
        return
    wanted = secret.encode()
    if not 0 < start < end or len(shown) != end - start:
        return
    place = shown.find(wanted)
    while place >= 0:
        ctypes.memset(start + place, ord("x"), len(wanted))
        place = shown.find(wanted, place + len(wanted))
