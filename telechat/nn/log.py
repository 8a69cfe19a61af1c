"""What a user should know of a choice that was made for them: one line on stderr, once."""

import sys

_said = set()


def log_once(note):
    """Print a line about the kernels that this process has not printed yet."""
    if note not in _said:
        _said.add(note)
        print(f"kernels: {note}", file=sys.stderr, flush=True)
