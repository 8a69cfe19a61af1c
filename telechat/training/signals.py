"""Signals that end a run, noted instead of breaking off in the middle of a step."""

import contextlib
import os
import select
import signal
import sys
import threading
import time

from telechat.lost_output import drop_lost_output
from telechat.parallel.rendezvous import answers, may_speak

# SIGHUP comes when the terminal or the connection is gone, SIGUSR1 from Slurm (--signal) some time before it kills.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
INTERVAL = 3  # seconds between two looks at the scheduler
LOOKS = 3  # that it must not have answered in a row


class StopSignal:
    """Notes SIGINT, SIGTERM, SIGHUP and SIGUSR1 instead of breaking off in the middle of a step.

    SIGHUP stays without effect where it had none before, under nohup.

    MindSpore sends a process SIGTERM when it has lost the job's scheduler, which ends with the node that it runs on.
    The step is never finished then: it waits for a process that is dead. So after a signal the scheduler is
    watched, and this process ends, with status 1, where it is gone.

    A second SIGINT ends the process at once, with status 130, whatever it is doing: compiling, computing, saving. What
    was saved before stays whole, and what was being saved never gets its name.

    Args:
        scheduler (tuple): host and port; None where the process is alone.
    """

    def __init__(self, scheduler=None):
        self.received = False
        self._previous = {}
        for number in ENDING:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._note)
        # Python runs no handler while the main thread compiles, computes or waits for others; a byte in a pipe comes
        # through.
        reading, self._wake_up = os.pipe()
        os.set_blocking(self._wake_up, False)
        signal.set_wakeup_fd(self._wake_up, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(reading, scheduler), daemon=True).start()

    def _note(self, number, frame):
        if self.received and number == signal.SIGINT:
            _break_off()
        self.received = True
        if number == signal.SIGHUP:
            drop_lost_output(flush=False)
        # Not by print: the signal may have come in the middle of one, and a stream cannot be entered twice.
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stdout.fileno(), b"finishing this step, then saving (press Ctrl-C again to break off)\n")

    def restore(self):
        """Give the signals back to whoever had them before, and end the thread that waits for them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._wake_up)  # ends the thread


def _break_off():
    """End this process now. Not by an exception: what it would unwind may take minutes, or never come back."""
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), b"interrupted; what had been saved before is whole\n")
    os._exit(130)


def _watch(reading, scheduler):
    """After the first signal that ``reading`` tells of, and until it ends: end this process at a SIGINT, or once the
    scheduler, if there is one, no longer answers."""
    noted = os.read(reading, 1)
    missed = 0
    while noted and missed < LOOKS:
        if select.select([reading], [], [], INTERVAL if scheduler else None)[0]:
            noted = os.read(reading, 1)
            if noted and noted[0] == signal.SIGINT:
                _break_off()
        else:
            missed = 0 if answers(scheduler) else missed + 1
    if noted:
        # One process of each node says it, and its end ends the others: not before they have noticed as well.
        if may_speak():
            print(f"error: the scheduler at {scheduler[0]}:{scheduler[1]} is gone, and with it its node's processes, "
                  "one of which failed first; what is said there tells why", file=sys.stderr, flush=True)
            time.sleep(INTERVAL)
        else:
            time.sleep(5 * INTERVAL)
        os._exit(1)  # the main thread waits for what never comes
