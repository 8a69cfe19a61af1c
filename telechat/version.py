"""What code this is, so that processes that must run the same can tell."""

import hashlib
import importlib.metadata
import pathlib

from telechat.errors import InputError

OLDEST, TOO_NEW = (2, 8), (2, 11)  # MindSpore's versions that setup.py allows; 2.7: `parameter.data` is no alias


def check_mindspore():
    """InputError unless the installed MindSpore is one that setup.py allows; does not import it."""
    bounds = f"from {OLDEST[0]}.{OLDEST[1]} to below {TOO_NEW[0]}.{TOO_NEW[1]}"
    try:
        version = importlib.metadata.version("mindspore")
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"MindSpore is not installed; install mindspore {bounds}") from None
    if not OLDEST <= tuple(int(part) for part in version.split(".")[:2]) < TOO_NEW:
        raise InputError(f"MindSpore {version} is outside the bounds of this library; install mindspore {bounds}")


def code_version():
    """SHA-256 over the library's source files, a hex string."""
    folder = pathlib.Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
