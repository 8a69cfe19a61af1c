"""Output that nobody reads any more: of a pipe whose reader has ended, of a terminal that is gone."""

import os
import stat
import sys


def drop_lost_output(flush=True):
    """Send what is still to be written to nowhere, where stdout or stderr cannot be written to any more.

    Otherwise whatever is printed next fails, at the latest when Python ends and writes what it has kept.

    Args:
        flush (bool): try it by writing what is kept back. False, in a signal's handler, which may have come in the middle
            of a write: only a terminal that is gone is noticed.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            number = stream.fileno()
            gone = stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number)
        except (OSError, ValueError, AttributeError):  # closed, replaced, or none at all
            continue
        if flush and not gone:
            try:
                stream.flush()
            except OSError:
                gone = True
        if gone:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
