"""Signals that end a run. A process that waits for others lives on while the job's scheduler does, and no longer."""

import os
import pty
import signal
import socket
import subprocess
import sys

import pytest

from telechat.training import signals
from tests.conftest import ROOT

SCRIPT = """
import ctypes, sys, threading
from telechat.training import signals
signals.INTERVAL = 0.1
stop = signals.StopSignal(("127.0.0.1", int(sys.argv[1])))
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)  # zeros are an open one
libc.pthread_mutex_lock(mutex)

def release():
    sys.stdin.read(1)
    libc.pthread_mutex_unlock(mutex)

threading.Thread(target=release, daemon=True).start()
print("ready", flush=True)
# As in a collective whose other side is dead: C waits on after a signal, and no handler of Python's runs.
libc.pthread_mutex_lock(mutex)
print("received", stop.received, flush=True)
"""


@pytest.fixture
def waiting():
    """A process that waits in C until a character is typed, and the scheduler's listening socket."""
    scheduler = socket.create_server(("127.0.0.1", 0))
    scheduler.settimeout(60)
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(scheduler.getsockname()[1])], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    yield process, scheduler
    scheduler.close()
    process.kill()
    process.wait()


def test_it_ends_when_the_scheduler_is_gone(waiting):
    process, scheduler = waiting
    port = scheduler.getsockname()[1]
    process.send_signal(signal.SIGTERM)
    scheduler.accept()  # it looks, and finds the scheduler
    scheduler.close()
    assert process.wait(60) == 1
    assert process.stderr.read().startswith(f"error: the scheduler at 127.0.0.1:{port} is gone")


def test_it_stays_while_the_scheduler_answers(waiting):
    process, scheduler = waiting
    process.send_signal(signal.SIGTERM)
    for _ in range(6):  # twice as often as it would take
        scheduler.accept()
    out, err = process.communicate("\n", timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.endswith("received True\n")


def test_without_a_signal_nobody_looks(waiting):
    process, scheduler = waiting
    scheduler.close()
    out, err = process.communicate("\n", timeout=60)
    assert (process.returncode, out, err) == (0, "received False\n", "")


def test_a_signal_may_come_in_the_middle_of_a_print():
    """The main thread waits in a write to a pipe that nobody reads yet; the signal interrupts that."""
    script = """
import signal, sys, threading, time
from telechat.training.signals import StopSignal
stop = StopSignal()
def send():
    time.sleep(1)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
    print("sent", file=sys.stderr, flush=True)
threading.Thread(target=send).start()
for _ in range(2000):
    print("x" * 100, flush=True)
print("received", stop.received)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stderr.readline() == "sent\n"
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.count("x") == 200000 and "finishing this step" in out and out.endswith("received True\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], ids=lambda number: number.name)
def test_signals_that_end_a_run(number, capfd):
    before = signal.getsignal(number)
    stop = signals.StopSignal()
    try:
        os.kill(os.getpid(), number)
        assert stop.received
    finally:
        stop.restore()
    assert signal.getsignal(number) == before
    assert capfd.readouterr().out.startswith("finishing this step, then saving")


def test_nohup_keeps_a_hangup_away():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = signals.StopSignal()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.received
    finally:
        stop.restore()
        signal.signal(signal.SIGHUP, before)


def test_a_run_outlives_its_terminal(tmp_path):
    """The connection breaks: SIGHUP, and from then on every write to the terminal fails."""
    script = """
import sys, time
from telechat.training.signals import StopSignal
stop = StopSignal()
while not stop.received:
    print("step", flush=True)
    time.sleep(0.05)
print("saving", flush=True)
print("more", file=sys.stderr, flush=True)
open(sys.argv[1], "w").write("saved")
"""
    controller, terminal = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "done")], cwd=ROOT, stdin=terminal,
                               stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    while b"step" not in os.read(controller, 1000):
        pass
    process.send_signal(signal.SIGSTOP)  # so that no step is printed between the two
    os.close(controller)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0 and (tmp_path / "done").read_text() == "saved"
