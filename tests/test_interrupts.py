"""Ctrl-C as MindSpore hands it on: a SIGTERM that the process sends itself."""

import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT

BEGIN = """
import os, signal, sys, time
from telechat.interrupts import keep_interrupts

keep_interrupts()
print("ready", flush=True)
"""
# In the middle of an answer, twice; the second time through Python's own handler, as at a prompt.
TWICE = """
for number in (signal.SIGTERM, signal.SIGINT):
    try:
        os.kill(os.getpid(), number)
        for _ in range(2000):
            time.sleep(0.01)
    except KeyboardInterrupt:
        print("stopped", flush=True)
"""
# The main thread does not come to a handler: signals of Python's are only looked at between steps of it.
STUCK = """
import ctypes, threading
for seconds in (0.5, 1.0):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()
ctypes.CDLL(None).poll(None, 0, 20_000)
print("not stopped", flush=True)
"""


def run(code):
    return subprocess.run([sys.executable, "-c", BEGIN + code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_it_interrupts_and_the_process_goes_on():
    result = run(TWICE)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ready\nstopped\nstopped\n", "")


def test_the_second_ends_a_process_that_does_not_come_to_it():
    result = run(STUCK)
    assert result.returncode == 130 and "not stopped" not in result.stdout


def test_where_it_is_ignored_it_stays_so():
    """As in the processes of msrun."""
    result = run("signal.signal(signal.SIGINT, signal.SIG_IGN)\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(0.3)\nprint('on')")
    assert (result.returncode, result.stdout) == (0, "ready\non\n")


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, -15), (signal.SIGINT, 1)])
def test_a_signal_from_elsewhere(number, status):
    process = subprocess.Popen([sys.executable, "-c", BEGIN + "time.sleep(20)"], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (status, -2) and ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
