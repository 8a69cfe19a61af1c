"""A worker's log as `tools/launch.py` reads it: shown as it grows, searched for errors, its end shown at a failure."""

import os
import re
import sys

SHOWN_LINES = 25
# After its traceback a process under MindSpore takes some seconds to end (6 measured), and others may fail
# of it meanwhile: an error line counts. One written longer ago was survived.
ERROR_AGE = 20

REFUSAL = b"error: "  # how `telechat.cli.run` begins its one sentence
ERROR_LINE = re.compile(rb"Traceback \(most recent call last\):|error: |Fatal Python error|terminate called")
CHATTER = re.compile(r"\[(INFO|WARNING)\] \w+\(")  # of MindSpore itself, whatever GLOG_v says
# How lines begin that are not shown as they come. A log holds both streams of its process: what was written to stderr
# goes there again.
SORTED_OUT = (REFUSAL, b"[INFO] ", b"[WARNING] ", b"progress: ", b"kernels: ", b"warning: ", b"rank ")
ASIDE = re.compile(r"progress: |kernels: |warning: |rank \d+/\d+: pipeline ")


class Log:
    """A file that grows: what is new goes to a stream, the times of error lines are kept.

    A sentence that begins with "error: " goes to stderr instead, where the script had written it, and is kept in
    ``said``: the report at the end need not say it again. So do progress, notes and warnings. MindSpore's chatter stays
    in the file.
    """

    def __init__(self, path, stream=None):
        self.path = path
        self.error_times = []
        self.said = []
        self._stream = stream
        self._offset, self._line = 0, b""
        self._withheld, self._within_line = b"", False

    def read_on(self, now):
        """Show what was added since the last call."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        self._offset += len(data)
        *lines, self._line = (self._line + data).split(b"\n")
        if any(ERROR_LINE.match(line) for line in lines):
            self.error_times = [moment for moment in self.error_times if now - moment <= ERROR_AGE] + [now]
        if data and self._stream:
            self._show(data)

    def _show(self, data):
        """Sort new bytes into stream and stderr; the start of a line is held back only while that may matter."""
        shown = []
        data, self._withheld = self._withheld + data, b""
        for line in data.splitlines(keepends=True):
            whole = line.endswith(b"\n")
            if self._within_line or not any(line.startswith(start) or start.startswith(line) for start in SORTED_OUT):
                shown.append(line)
                self._within_line = not whole
            elif not whole:
                self._withheld = line
            elif line.startswith(REFUSAL):
                self._write(b"".join(shown))
                shown = []
                self.said.append(line.decode(errors="replace").rstrip())
                say(self.said[-1])
            elif ASIDE.match(line.decode(errors="replace")):
                self._write(b"".join(shown))
                shown = []
                say(line.decode(errors="replace").rstrip())
            elif not CHATTER.match(line.decode(errors="replace")):
                shown.append(line)
        self._write(b"".join(shown))

    def finish(self):
        """Nothing more will come: show what was withheld."""
        self._write(self._withheld)
        self._withheld = b""

    def _write(self, data):
        if not data or not self._stream:
            return
        try:
            self._stream.write(data)
            self._stream.flush()
        except BrokenPipeError:
            # Nobody reads any more; that is no reason to end a job on many cards. What is left in the
            # buffer goes nowhere, or Python would fail of it at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self._stream = None

    def lines(self):
        """All lines but MindSpore's chatter."""
        try:
            with open(self.path, encoding="utf-8", errors="replace") as file:
                return [line.rstrip("\n") for line in file if not CHATTER.match(line)]
        except FileNotFoundError:
            return []


def show_end(log, headline, status=1):
    """Print the last lines of a log under a headline; returns ``status``."""
    say(f"{headline}; the end of {log.path}:", *(f"    {line}" for line in log.lines()[-SHOWN_LINES:]))
    return status


def say(*lines):
    """Print to stderr, at once: stdout is rank 0's."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)
