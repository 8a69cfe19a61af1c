"""Signals that end a run. A process that waits for others lives on while the job's scheduler does, and no longer."""

import os
import pty
import signal
import socket
import subprocess
import sys
import time

import pytest

from telechat import TeleChat, TrainConfig, Trainer
from telechat.training import signals
from telechat.training.training_state import list_checkpoints, restore
from tests.conftest import ROOT

SCRIPT = """
import ctypes, sys, threading
from telechat.training import signals
signals.INTERVAL = 0.1
stop = signals.StopSignal(("127.0.0.1", int(sys.argv[1])) if int(sys.argv[1]) else None)
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


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_ends_at_once_what_does_not_return(first):
    """As in a compilation of minutes: no handler of Python's runs, and two signals of a kind would be one to it."""
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, "0"], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(first)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)  # and not communicate, which closes the input, and so lets the process go on
    assert (process.returncode, process.stderr.read()) == (130, "interrupted; what had been saved before is whole\n")


def test_an_interrupt_right_behind_other_signals_is_seen(monkeypatch):
    reading, writing = os.pipe()
    os.write(writing, bytes([signal.SIGTERM, signal.SIGTERM, signal.SIGINT]))
    os.close(writing)
    broken_off = []
    monkeypatch.setattr(signals, "_break_off", lambda: broken_off.append(1))
    signals._watch(reading, None)
    os.close(reading)
    assert broken_off == [1]


def test_a_second_interrupt_while_saving_leaves_what_was_saved(tmp_path):
    """The second save never gets its name, the first one is resumed from."""
    script = """
import sys, time
from telechat import TeleChat, TeleChatConfig, TrainConfig, Trainer
from telechat.training import signals, training_state
model = TeleChat(TeleChatConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2, ffn_hidden_size=48))
trainer = Trainer(model, TrainConfig())
stop = signals.StopSignal()
training_state.save_training_checkpoint(sys.argv[1], trainer, {})
trainer.step = 1
training_state._flush = lambda path, deep=True: (print("saving", flush=True), time.sleep(60))
training_state.save_training_checkpoint(sys.argv[1], trainer, {})
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    for line in process.stdout:
        if line == "saving\n":
            break
    process.send_signal(signal.SIGINT)
    assert "finishing" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted; what had been saved before is whole" in err
    assert list_checkpoints(tmp_path) == [str(tmp_path / "checkpoint-000000")]
    trainer = Trainer(TeleChat.from_pretrained(tmp_path / "checkpoint-000000"), TrainConfig())
    restore(str(tmp_path / "checkpoint-000000"), trainer, {})
    assert trainer.step == 0
