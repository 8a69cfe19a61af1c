"""Signals end a server whatever its main thread is at."""

import os
import queue
import signal
import threading
import time
import types

import pytest

from telechat.parallel.mesh import Mesh
from telechat.serving import stopping


class Busy:
    """Stands in for a Service."""

    def __init__(self):
        self.stopping = self.hurried = self.over = False
        self.deserted = True

    def hurry(self):
        self.hurried = True


@pytest.fixture
def handled(monkeypatch):
    """(service, queue of exit statuses) under signal handling with short patience."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(stopping, "DESERTED_SECONDS", 0.3)
    service, ends = Busy(), queue.Queue()
    stopping.StopSignals(service, Mesh.single().world, ends.put)
    yield service, ends
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def wait_until(holds):
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_first_signal_waits_for_clients_alone(handled):
    service, ends = handled
    service.deserted = False
    os.kill(os.getpid(), signal.SIGINT)
    wait_until(lambda: service.stopping)
    time.sleep(0.6)
    assert ends.empty() and not service.hurried, "somebody waits for an answer"
    service.deserted = True
    assert ends.get(timeout=10) == 0


def test_a_loop_that_has_ended_is_left_to_send_its_answers(handled):
    service, ends = handled
    service.over = True
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(lambda: service.stopping)
    time.sleep(0.6)
    assert ends.empty()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_ends_at_once(handled, number, status):
    service, ends = handled
    service.deserted = False
    os.kill(os.getpid(), signal.SIGINT)
    wait_until(lambda: service.stopping)
    os.kill(os.getpid(), number)
    assert ends.get(timeout=10) == status and service.hurried


def test_other_ranks_wait_for_the_first(monkeypatch):
    set_to, started = {}, []
    monkeypatch.setattr(stopping.signal, "signal", set_to.__setitem__)
    monkeypatch.setattr(threading.Thread, "start", started.append)
    stopping.StopSignals(Busy(), types.SimpleNamespace(rank=1, size=2))
    assert set_to == {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN} and started == []
