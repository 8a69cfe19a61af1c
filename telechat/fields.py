"""One field of a configuration, whoever wrote the file: its type, its default and its bounds.

Each function takes the field's name and the value that was read, gives back the value to use, and raises InputError with
one sentence that names the field, the bounds and the value. ``default`` is what null means; without one null is refused.
A whole number may be written 1.0, as JSON writers of other languages do; true is never a number.
"""

import math
import re

from telechat.errors import InputError

REQUIRED = object()
LARGEST = 2 ** 53  # of whole numbers: up to here a float is exact
_SHOWN = 60  # characters of a value in a message
_UNITS = {"MB": 10 ** 6, "GB": 10 ** 9, "TB": 10 ** 12, "MIB": 2 ** 20, "GIB": 2 ** 30, "TIB": 2 ** 40}


def shown(value):
    """A value as a message shows it: short, whatever it is."""
    try:
        text = str(value) if hasattr(value, "isoformat") else repr(value)
    except (ValueError, RecursionError):  # numbers of thousands of digits, lists in lists in lists
        text = "a value too large to be shown"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def whole_number(name, value, least=0, most=LARGEST, default=REQUIRED):
    """An int from ``least`` to ``most``."""
    if value is None and default is not REQUIRED:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        bounds = f"of at least {least}" if most == LARGEST else f"from {least} to {most}"
        if isinstance(value, int) and not isinstance(value, bool) and value > most:
            bounds = f"from {least} to {most}"
        raise InputError(f"{name} must be a whole number {bounds}, not {shown(value)}")
    return value


def real_number(name, value, least=-math.inf, most=math.inf, above=-math.inf, below=math.inf, default=REQUIRED):
    """A finite float or int with least <= value <= most and above < value < below."""
    if value is None and default is not REQUIRED:
        return default
    good = not isinstance(value, bool) and isinstance(value, (int, float))
    try:
        good = good and math.isfinite(value) and least <= value <= most and above < value < below
    except OverflowError:  # a whole number beyond the largest float
        good = False
    if not good:
        bounds = [f"{word} {bound:g}" for word, bound in
                  (("at least", least), ("above", above), ("at most", most), ("below", below)) if math.isfinite(bound)]
        raise InputError(" ".join([name, "must be a number", " and ".join(bounds)]).strip() + f", not {shown(value)}")
    return value


def flag(name, value, default=REQUIRED):
    """True or False."""
    if value is None and default is not REQUIRED:
        return default
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, not {shown(value)}")
    return value


def one_of(name, value, choices, default=REQUIRED):
    """One of a tuple of texts."""
    if value is None and default is not REQUIRED:
        return default
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, not {shown(value)}")
    return value


def path(name, value, default=REQUIRED):
    """A path, as it was written."""
    if value is None and default is not REQUIRED:
        return default
    if not isinstance(value, str) or not value or "\0" in value:
        raise InputError(f"{name} must be a path, not {shown(value)}")
    return value


def token_id(name, value, default=REQUIRED):
    """One token id; a list of one is that one."""
    ids = token_ids(name, value, default)
    if isinstance(ids, tuple):
        if len(ids) != 1:
            raise InputError(f"{name} must be one token id, not {shown(value)}")
        ids = ids[0]
    return ids


def token_ids(name, value, default=REQUIRED):
    """A tuple of token ids, written as one id or as a list of them."""
    if value is None and default is not REQUIRED:
        return default
    try:
        return tuple(whole_number(name, index, -1, 2 ** 31 - 1)  # some files say -1 for none
                     for index in (value if isinstance(value, list) else [value]))
    except InputError:
        raise InputError(f"{name} must be a token id or a list of token ids, not {shown(value)}") from None


def byte_size(text, flag):
    """Bytes of "64GB" or "60GiB", the value of a command-line flag."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGTmgt][Ii]?[Bb])\s*", text)
    if not match or not float(match[1]):
        raise InputError(f"{flag} {text} is not a size such as 64GB, 60GiB or 500MB")
    return round(float(match[1]) * _UNITS[match[2].upper()])
