"""How a server ends: after the running answers at the first SIGINT or SIGTERM, at once at the second.

A handler of Python's runs between two steps of the main thread, which may be in a prompt's products or a graph's
compilation for a long time. So the signal's number goes through a pipe to a thread of its own.
"""

import os
import signal
import sys
import threading
import time

DESERTED_SECONDS = 1.5  # that the loop may go on working on what nobody waits for
HURRIED_SECONDS = 3.0  # in which other processes are told of a second signal


class StopSignals:
    """Handles SIGINT and SIGTERM; to be made in the main thread, once.

    Under msrun the first process decides for all: one that ended on its own would leave the others waiting.

    Args:
        service (Service): is told to stop.
        world (Group): the processes that share the model.
        end (callable): takes an exit status and ends the process as it stands.
    """

    def __init__(self, service, world, end=None):
        self._service = service
        self._alone = world.size == 1
        self._end = end or _end
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN if world.rank else lambda number, frame: None)
        if world.rank == 0:
            self._numbers, written = os.pipe()
            os.set_blocking(written, False)
            signal.set_wakeup_fd(written, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def _watch(self):
        for count, number in enumerate(self._received()):
            if count == 0:
                self._service.stopping = True
                if self._alone:
                    threading.Thread(target=self._end_if_deserted, name="stopping", daemon=True).start()
                continue
            self._service.hurry()
            if not self._alone:
                time.sleep(HURRIED_SECONDS)
            self._end(128 + number)

    def _received(self):
        while True:
            for number in os.read(self._numbers, 1):
                if number in (signal.SIGINT, signal.SIGTERM):
                    yield number

    def _end_if_deserted(self):
        """Do not wait for work that nobody waits for; the main thread usually ends the process before."""
        since = time.monotonic()
        while time.monotonic() - since < DESERTED_SECONDS:
            time.sleep(0.1)
            if not self._service.deserted:
                since = time.monotonic()
        if not self._service.over:  # else the last answers are being sent, which has a limit of its own
            self._end(0)


def _end(status):
    print("stopped", flush=True)
    sys.stderr.flush()
    os._exit(status)
