"""More clients than file descriptors: the server stays well, and says so little that no disk fills up."""

import asyncio
import errno
import http.client
import json
import resource
import socket
import subprocess
import sys

import pytest

from telechat import InputError
from telechat.serving import connections, http_server
from telechat.serving.log import Log, describe_failure
from tests.conftest import ROOT

SERVER = """
import resource, sys
from telechat.serving.http_server import HttpServer

async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})

hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), hard))
server = HttpServer("127.0.0.1", 0)
server.start(answer)
print(server.port, flush=True)
sys.stdin.read()
server.stop()
"""


def health(port):
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    client.request("GET", "/")
    status = client.getresponse().status
    client.close()
    return status


@pytest.mark.parametrize("descriptors, clients", [(48, 60), (300, 600)])
def test_idle_connections_make_room_for_a_client(descriptors, clients):
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(descriptors)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    port = int(process.stdout.readline())
    idle = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(clients)]
    assert [health(port) for _ in range(3)] == [204] * 3, "while all of them are there"
    for client in idle:
        client.close()
    assert health(port) == 204
    _, errors = process.communicate("", timeout=20)
    assert process.returncode == 0 and errors == ""


class Idle:
    """Stands in for a connection's protocol."""

    def __init__(self):
        self.aborted = False
        self.transport = self

    def abort(self):
        self.aborted = True


def test_the_one_that_is_idle_for_longest_goes_and_busy_ones_stay(monkeypatch):
    held = connections.Connections(None, limit=3)
    held._pause = held._resume = lambda: None
    busy, first, second = Idle(), Idle(), Idle()
    for protocol in (busy, first, second):
        held.is_idle(protocol)
    held.is_busy(busy)
    held.is_idle(first)  # again: it keeps its place
    held.count = 3
    held._take()
    assert [protocol.aborted for protocol in (busy, first, second)] == [False, True, False]
    held.closed(first)
    assert held.count == 2
    held.count = 3
    held.is_busy(second)
    held._take()
    assert not second.aborted, "nobody is idle: the new one waits"


def test_the_limit_follows_ulimit(monkeypatch):
    monkeypatch.setattr(connections.os, "listdir", lambda path: ["0"] * 30)
    for soft, limit in ((30 + 8 + 4, 4), (48, 48 - 30 - 8), (1024, 1024 - 30 - 8), (1 << 20, connections.MOST_CONNECTIONS),
                        (resource.RLIM_INFINITY, connections.MOST_CONNECTIONS)):
        monkeypatch.setattr(connections.resource, "getrlimit", lambda kind, soft=soft: (soft, soft))
        assert connections.connection_limit() == limit
    for soft in (30, 30 + 8 + 3):
        monkeypatch.setattr(connections.resource, "getrlimit", lambda kind, soft=soft: (soft, soft))
        with pytest.raises(InputError, match=f"ulimit -n {soft} leaves no file descriptors for connections; raise it to 102"):
            connections.connection_limit()


def test_a_system_without_descriptors_is_told_of_once_a_second_and_got_over(monkeypatch, capsys):
    """As where other processes have taken all that there are."""
    monkeypatch.setattr(connections, "PAUSE", 0.02)
    monkeypatch.setattr(connections, "log", Log())
    accept, failures = connections.Connections._take, []

    class Full:
        def __init__(self, listener):
            self._listener = listener

        def __getattr__(self, name):
            return getattr(self._listener, name)

        def accept(self):
            if len(failures) < 10:
                failures.append(1)
                raise OSError(errno.ENFILE, "Too many open files in system")
            return self._listener.accept()

    def take(held):
        if not isinstance(held._listener, Full):
            held._listener = Full(held._listener)
        accept(held)

    monkeypatch.setattr(connections.Connections, "_take", take)

    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    server = http_server.HttpServer("127.0.0.1", 0)
    server.start(answer)
    try:
        assert health(server.port) == 204 and len(failures) == 10
    finally:
        server.stop()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("a connection could not be taken: OSError: [Errno 23] Too many open")


def test_lines_that_come_too_fast_are_counted(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("telechat.serving.log.time.monotonic", lambda: now[0])
    log = Log()
    for later in (0, 0.5, 0.4, 0.2, 2):
        now[0] += later
        log(f"at {now[0]:.1f},\na line")
    assert capsys.readouterr().err == "at 100.0, a line\nat 101.1, a line (2 lines more since the last one)\n" \
                                      "at 103.1, a line\n"


def test_a_connection_that_is_gone_before_it_is_made_leaves_its_place(monkeypatch, capsys):
    monkeypatch.setattr(connections, "log", Log())

    class Loop:
        async def connect_accepted_socket(self, make, connection):
            raise OSError(errno.EBADF, "Bad file descriptor")

    held = connections.Connections(None, limit=3)
    held._loop, held.count = Loop(), 2
    one, other = socket.socketpair()
    asyncio.run(held._connect(one))
    assert held.count == 1 and one.fileno() == -1
    assert capsys.readouterr().err.startswith("a connection was lost: OSError: [Errno 9] Bad file descriptor")
    other.close()


def test_a_failure_is_described_by_the_line_that_it_comes_from():
    def fail():
        raise ValueError("x" * 400)
    try:
        fail()
    except ValueError as error:
        line = fail.__code__.co_firstlineno + 1
        assert describe_failure(error) == f"ValueError: {'x' * 300} (test_connections.py, line {line})"
    try:
        json.loads(3)
    except TypeError as error:
        line = error.__traceback__.tb_next.tb_lineno
        assert describe_failure(error).endswith(f" (__init__.py, line {line})"), "where it was raised, not where called"
    assert describe_failure(OSError("gone")) == "OSError: gone"
