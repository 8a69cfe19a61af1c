"""Text that people and other programs write: byte order marks, encodings, JSON, and what is no text at all."""

import json
import os

from telechat.errors import InputError

LFS_POINTER = b"version https://git-lfs"  # how the file begins that Git leaves where Git LFS was not installed
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_file(path, wanted):
    """The bytes of a file.

    Args:
        path: the file.
        wanted (str): what to give instead, the end of the sentence about a file that cannot be read.

    Raises:
        InputError: it cannot be read, or is no file but a placeholder for one (see `refuse_placeholder`).
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); {wanted}") from None
    refuse_placeholder(path, data)
    return data


def refuse_placeholder(path, data):
    """Raise InputError where the first bytes of a file, ``data``, are a Git LFS pointer's or a web page's."""
    if data.startswith(LFS_POINTER):
        raise InputError(f"{path} is a Git LFS pointer, a note of where the file is and not the file itself; "
                         "fetch it with `git lfs pull` in the repository, or download the file again")
    if data[:64].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise InputError(f"{path} is a web page and not the file itself; download the file again, by the address of "
                         "the file and not of the page that shows it")


def refuse_placeholder_file(path):
    """`refuse_placeholder` of a file of any size, of which only the beginning is read; one that is absent is let pass."""
    try:
        with open(path, "rb") as file:
            beginning = file.read(64)
    except OSError:
        return
    refuse_placeholder(path, beginning)


def decode(data):
    """The text of UTF-8 bytes, without the byte order mark that Windows' editors put in front.

    Raises:
        InputError: other encodings; the message goes behind a file's name.
    """
    if data.startswith(_UTF16_MARKS):
        raise InputError("is not UTF-8 but UTF-16; save the file as UTF-8")
    try:
        return data.removeprefix(_UTF8_MARK).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError("is not UTF-8; save the file as UTF-8") from None


def parse_json(text):
    """What a JSON text says.

    Raises:
        InputError: it is not JSON, gives a field twice, or holds what no text can be made of again; the message goes
            behind a file's name.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_repetition)
    except json.JSONDecodeError as error:
        where = f" at line {error.lineno}" if "\n" in text.strip() else ""
        raise InputError(f"is not valid JSON ({error.msg}{where})") from None
    except RecursionError:
        raise InputError("is not valid JSON (nested too deeply)") from None
    except InputError:
        raise
    except ValueError:  # Python's limit on the digits of a number that it reads
        raise InputError("holds a number of thousands of digits; shorten it, or put it in quotation marks") from None
    return value


def _without_repetition(pairs):
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"gives the field {json.dumps(twice)[:60]} twice; keep one")
    return values


def read_json_object(path, wanted):
    """The content of a JSON file that holds one object, as a dict.

    Args:
        path: the file.
        wanted (str): as for `read_file`.

    Raises:
        InputError: names the file and what is wrong with it.
    """
    data = read_file(path, wanted)
    if not data.strip():
        raise InputError(f"{path} is empty; {wanted}")
    try:
        values = parse_json(decode(data))
    except InputError as error:
        raise InputError(f"{path} {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a JSON object")
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{path} holds half of a surrogate pair; write the whole character") from None
    return values


def expand_path(path):
    """A path with ~, ~user, $NAME and ${NAME} replaced, as a shell does; one that exists as it stands is left alone.

    Raises:
        InputError: the path is not UTF-8, as of a folder that was named on a system in GBK; MindSpore and torch cannot take
            one, and JSON cannot hold it.
    """
    if not os.path.lexists(path):
        path = os.path.expanduser(os.path.expandvars(path))
    try:
        os.path.abspath(path).encode("utf-8")
    except UnicodeEncodeError:
        shown = path.encode("utf-8", "replace").decode()
        raise InputError(f"the path {shown} is not UTF-8 throughout; rename the folder or file") from None
    except FileNotFoundError:  # relative to a directory that is gone, which is said where it is opened
        pass
    return path
