"""Files of JSON records: an object a line, or one array of objects."""

from telechat.errors import InputError
from telechat.text_files import decode, parse_json, read_file

_WANTED = "give a JSONL file"
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def read_records(path):
    """The records of a file: JSONL, or one JSON array as data sets for other trainers often are.

    Lines with nothing but white space are passed over, the first one too, and so are byte order marks, which files put
    together from several have in the middle as well.

    Args:
        path: the file.

    Returns:
        list of (place, value): where it stands ("line 3" or "record 3", from 1) and what JSON gives for it.

    Raises:
        InputError: names the file, and the place where there is one.
    """
    data = read_file(path, _WANTED)
    _refuse_other_forms(path, data)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        in_file(path, None, decode, data)
    array = _array(path, data)
    if array is not None:
        records = [(f"record {number}", value) for number, value in enumerate(array, start=1)]
    else:
        records = [(f"line {number}", in_file(path, f"line {number}", _parse, line))
                   for number, line in enumerate(data.split(b"\n"), start=1) if line.strip(b"\xef\xbb\xbf \t\r\v\f")]
    if not records:
        raise InputError(f"{path} holds no line of JSON; give a JSONL file with an object a line")
    return records


def _refuse_other_forms(path, data):
    """Raise InputError where a file is packed, a table, or one JSON object that is spread over lines."""
    for beginning, program in _PACKED.items():
        if data.startswith(beginning):
            raise InputError(f"{path} is packed with {program}; unpack it, and give the JSONL file in it")
    if data.startswith(b"PAR1"):
        raise InputError(f"{path} is a Parquet file; save its records as JSONL, an object a line")
    if data[:1 << 16].removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)[0].rstrip() == b"{":
        raise InputError(f"{path} spreads a JSON object over several lines; write each in a line of its own, or put all of "
                         "them into one array")


def _array(path, data):
    """The elements of a file that is one array over several lines or in one; None where it is not."""
    beginning = data[:1 << 16].removeprefix(b"\xef\xbb\xbf").lstrip()
    if not beginning.startswith(b"["):
        return None
    first = beginning.split(b"\n", 1)[0]
    try:
        value = parse_json(decode(data))
    except InputError:
        # An array in the first line and something else behind is a matter for that line.
        if first.rstrip().endswith(b"]"):
            return None
        in_file(path, None, _parse, data)
        raise
    return value if not value or isinstance(value[0], dict) else None


def _parse(line):
    return parse_json(decode(line))


def in_file(path, place, function, *arguments):
    """``function(*arguments)``, with file and place (or None) in front of the sentence of an InputError."""
    try:
        return function(*arguments)
    except InputError as error:
        raise InputError(f"{path}, {place}: {error}" if place else f"{path} {error}") from None
