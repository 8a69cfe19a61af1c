"""What a long operation is doing and how far it is: a tqdm bar on a terminal, elsewhere a line every ten seconds.

A terminal shows nothing of what is over within `PATIENCE` seconds. All goes to stderr: stdout is for results.
"""

import shutil
import sys
import threading
import time

PATIENCE = 3  # seconds that may pass in silence on a terminal
INTERVAL = 10  # seconds between two lines; a terminal is refreshed `REFRESHES` times in it
REFRESHES = 20
MARK = "progress: "  # how a line begins; tools/launch.py passes these on to stderr

_shown = []  # the Progress objects under way, innermost last: only that one is shown


def duration(seconds):
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(max(int(round(seconds)), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Shows an operation from ``with`` to its end.

    It is shown by a thread of its own, so it moves on during a call that does not return for minutes.

    Args:
        what (str): the operation, e.g. "loading weights".
        total (int): how many units it takes; None where that is not known.
        unit (str): of these, in the plural.

    Attributes:
        done (int): units so far; `advance` adds to it.
    """

    def __init__(self, what, total=None, unit=""):
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self._over = threading.Event()
        self._thread = None

    def __enter__(self):
        self._started = time.monotonic()
        _shown.append(self)
        self._thread = threading.Thread(target=self._show, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._over.set()
        self._thread.join()  # a bar is gone before anything else is printed
        _shown.remove(self)

    def advance(self, count=1):
        """So many more units are done."""
        self.done += count

    def line(self, seconds):
        """What is printed after so many seconds, at most about 80 columns."""
        text = f"{MARK}{self.what}"
        if self.total:
            text += f", {self.done:,} of {self.total:,} {self.unit}".rstrip()
        elif self.done:
            text += f", {self.done:,} {self.unit}".rstrip()
        return f"{text}, {duration(seconds)}"

    def _show(self):
        try:
            terminal = sys.stderr.isatty()
            if not self._over.wait(PATIENCE if terminal else INTERVAL):
                (self._draw if terminal else self._print)()
        except (OSError, ValueError, AttributeError):
            pass  # stderr is closed: nobody looks

    def _print(self):
        while True:
            if _shown[-1] is self:
                print(self.line(time.monotonic() - self._started), file=sys.stderr, flush=True)
            if self._over.wait(INTERVAL):
                return

    def _draw(self):
        from tqdm import tqdm

        bar = None
        while not self._over.wait(INTERVAL / REFRESHES):
            if _shown[-1] is not self:
                continue  # what goes on within this shows a bar of its own
            if bar is None:
                size = shutil.get_terminal_size()  # tqdm draws nothing where a terminal says that it has no columns
                bar = tqdm(desc=self.what, total=self.total, unit=f" {self.unit}", leave=False, file=sys.stderr,
                           ncols=size.columns, nrows=size.lines)
                bar.start_t -= time.monotonic() - self._started
            bar.n = self.done
            bar.refresh()
        if bar is not None:
            bar.close()


def track(items, what, unit, total=None):
    """Yield ``items`` one by one while a `Progress` counts them; total (int) where they have no length."""
    with Progress(what, len(items) if total is None else total, unit) as progress:
        for item in items:
            yield item
            progress.advance()
