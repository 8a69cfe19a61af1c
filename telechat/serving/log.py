"""What the server tells its operator besides its answers: a line a second at most, so that no flood fills a disk."""

import os
import sys
import threading
import time
import traceback

SECONDS_A_LINE = 1.0


class Log:
    """Writes lines to standard error; those that come too fast are counted, and the next line says how many they were.

    Safe to use from several threads.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._next = 0.0  # time.monotonic() before which nothing is written
        self._left_out = 0

    def __call__(self, text):
        """Write ``text`` as a line, or count it."""
        with self._lock:
            now = time.monotonic()
            if now < self._next:
                self._left_out += 1
                return
            more = f" ({self._left_out} lines more since the last one)" if self._left_out else ""
            self._next, self._left_out = now + SECONDS_A_LINE, 0
            print(" ".join(text.split()) + more, file=sys.stderr, flush=True)


log = Log()


def describe_failure(error):
    """An exception as a line: its kind, its words, and the line of code it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:300]}{place}"
