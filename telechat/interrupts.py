"""Ctrl-C while a graph is compiled or runs.

MindSpore puts a handler of its own in the place of Python's then, which answers SIGINT with a SIGTERM to its own
process: the tool would end in the middle of an answer without a word.
"""

import _thread
import os
import signal
import threading


def keep_interrupts():
    """Let Ctrl-C raise KeyboardInterrupt in the main thread at any time, and end the process where it comes twice.

    To be called in the main thread before there are others, by a tool that has no use for SIGTERM itself. One from
    another process still ends this one.
    """
    waiting = threading.Event()  # for the main thread, which may be in a graph for long

    def interrupt(number, frame):
        waiting.clear()
        raise KeyboardInterrupt

    def watch():
        while True:
            if signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getpid():
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
                signal.raise_signal(signal.SIGTERM)
            elif waiting.is_set():
                os._exit(128 + signal.SIGINT)
            elif signal.getsignal(signal.SIGINT) is interrupt:
                waiting.set()
                _thread.interrupt_main(signal.SIGINT)

    signal.signal(signal.SIGINT, interrupt)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=watch, name="interrupts", daemon=True).start()
