"""Clients that take their time and answers that take too long: each comes to an end, and nobody else notices."""

import asyncio
import json
import re
import socket
import struct
import threading
import time

import openai
import psutil
import pytest

from telechat import Tokenizer
from telechat.data.conversation import ChatFormat
from telechat.generation.settings import GenerationSettings
from telechat.parallel.mesh import Mesh
from telechat.serving import app, http_server
from telechat.serving.metrics import Metrics
from telechat.serving.protocol import Model
from telechat.serving.service import Service
from tests.conftest import ROOT
from tests.serving.conftest import KEY, MAX_LENGTH, CountingEngine, start
from tests.serving.test_hostile import CHAT, COMPLETION, Raw, good
from tests.serving.test_server import alone, ask, metric, question, wait_until


def test_clients_that_do_not_send_a_head_are_closed(monkeypatch):
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 0.3)

    async def answer(scope, receive, send):
        await asyncio.sleep(0.5)  # longer than a client may take for the head: an answer is not cut off
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    server = http_server.HttpServer("127.0.0.1", 0)
    server.start(answer)
    try:
        for sent in (b"", b"GET / HTTP/1.1\r\nHost: a\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HT"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
                client.sendall(sent)
                received = b""
                while True:
                    data = client.recv(4096)  # "" when the server closes
                    received += data
                    if not data:
                        break
                assert received.startswith(b"HTTP/1.1 204") == (b"\r\n\r\n" in sent)
    finally:
        server.stop()


@pytest.fixture
def impatient(monkeypatch):
    """The whole server in this process, with an engine that counts, little patience and a time limit of nothing."""
    monkeypatch.setattr(app, "PATIENCE", 0.3)
    engine = CountingEngine(slots=1, length=64, vocabulary=1664)
    service = Service(engine, Mesh.single().world, Metrics(), time_limit=1e-9)
    thread = threading.Thread(target=service.run)
    tokenizer = Tokenizer.from_pretrained(ROOT / "samples" / "tokenizer.model")
    defaults = GenerationSettings(tokenizer, ChatFormat.for_tokenizer(tokenizer), {}, 64, (2,))
    made = http_server.HttpServer("127.0.0.1", 0)
    made.start(app.App(service, Model("tiny", defaults, 64, 1664)).asgi)
    thread.start()
    yield made
    service.stopping = True
    thread.join(20)
    made.stop()


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_an_answer_past_the_time_limit_is_refused_or_its_stream_ends_with_the_error(impatient, path):
    raw = Raw(impatient.url)
    body = good() if path == CHAT else {"model": "tiny", "prompt": [300, 301], "max_tokens": 5}
    status, answer = raw("POST", path, json.dumps(body).encode())
    assert status == 504 and json.loads(answer)["error"]["code"] == "timeout"
    status, answer = raw("POST", path, json.dumps({**body, "stream": True}).encode())
    last = answer.decode().strip().split("\n\n")[-1]
    assert status == 200 and json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    raw.connection.close()


def test_a_body_that_does_not_come_is_given_up(impatient):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=20) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                       b"Content-Length: 100\r\n\r\n{")
        received = b""
        while b"}}" not in received:
            data = client.recv(4096)
            assert data, received
            received += data
    assert received.startswith(b"HTTP/1.1 408 ") and b"did not arrive" in received


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
                                  b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000],
                         ids=["TLS", "length", "long head"])
def test_what_is_no_http_is_refused_in_openais_form(impatient, sent):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=20) as client:
        client.sendall(sent)
        head, body = read_all(client).split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert json.loads(body)["error"] == {"message": "this is not an HTTP request that can be read", "param": None,
                                         "type": "invalid_request_error", "code": None}


def test_what_is_no_http_after_an_answer_closes_the_connection(impatient, caplog):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=20) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\n"
                       b"Transfer-Encoding: chunked\r\n\r\n")
        received = b""
        while b"}}" not in received:
            received += client.recv(4096)
        client.sendall(b"no length\r\n")
        assert received.startswith(b"HTTP/1.1 415 ") and read_all(client) == b""
    assert caplog.text == "", "no traceback in the server's output"


@pytest.mark.parametrize("rest", [b"", b"Transfer-Encoding: chunked\r\n\r\nno length"], ids=["closed", "broken"])
def test_a_client_that_goes_while_it_sends_a_body_is_no_failure_of_the_server(impatient, rest):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=20) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                       + (rest or b"Content-Length: 100\r\n\r\n{"))
    counted = set()
    wait_until(lambda: counted.update(re.findall(r'path="/v1/completions",status="(\d+)"', metrics(impatient))) or counted)
    assert counted == {"499"}


@pytest.mark.parametrize("sent", [b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nContent-Le"])
def test_a_client_that_goes_while_it_sends_a_head_leaves_nothing(impatient, sent, capfd):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=20) as client:
        client.sendall(sent)
        wait_until(lambda: impatient._server._connections.count == 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # the connection is reset, not closed
    wait_until(lambda: impatient._server._connections.count == 0)
    assert Raw(impatient.url)("GET", "/health")[0] == 200 and capfd.readouterr() == ("", "")


def metrics(server):
    return Raw(server.url)("GET", "/metrics")[1].decode()


@pytest.fixture(scope="module")
def hasty(checkpoint):
    """The real server, which waits for a second where it would wait for half a minute."""
    quick = "import runpy, sys; from telechat.serving import http_server; http_server.TAKE_SECONDS = 1.0; " \
            "sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/tools/')[0]); " \
            "runpy.run_path(sys.argv[0], run_name='__main__')"
    running, _ = start(checkpoint, "--api_key", KEY, "--max_batch", 4, "--max_length", MAX_LENGTH, python=["-c", quick])
    yield running
    assert running.stop()[0] == 0


def send_and_read_nothing(url, *requests):
    """A connection on which all the requests were sent at once; its client has room for next to nothing."""
    host, port = url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the system's least
    client.settimeout(60)
    client.connect((host, int(port)))
    client.sendall(b"".join(requests))
    return client


def request(method, path, body=None):
    data = b"" if body is None else json.dumps(body).encode()
    return (f"{method} {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n").encode() + data


def connections(server):
    """Ports of the clients that the server has a connection to."""
    found = psutil.Process(server.process.pid).net_connections("tcp")
    return {connection.raddr.port for connection in found if connection.raddr}


def read_all(client):
    received = b""
    try:
        while data := client.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def test_clients_that_do_not_read_hold_up_nobody_and_are_dropped(hasty, generator, tokenizer):
    client = openai.OpenAI(base_url=f"{hasty.url}/v1", api_key=KEY, max_retries=0, timeout=120)
    endless = good(messages=[{"role": "user", "content": "一直说"}], n=2, max_tokens=900, stream=True)
    stalled = [send_and_read_nothing(hasty.url, request("POST", CHAT, endless)),
               send_and_read_nothing(hasty.url, *[request("GET", "/")] * 100)]
    ports = {one.getsockname()[1] for one in stalled}
    wait_until(lambda: ports <= connections(hasty))
    # Half of the places are left for others, who get what they always get.
    expected, = alone(generator, tokenizer, question(tokenizer))
    for _ in range(3):
        assert ask(client, max_tokens=24).choices[0].message.content == expected
    wait_until(lambda: not ports & connections(hasty))
    wait_until(lambda: metric(client, "telechat_running_sequences") == 0)
    stream, pages = map(read_all, stalled)
    assert b"data: {" in stream and b"[DONE]" not in stream
    assert 0 < len(re.findall(rb"HTTP/1.1 200 OK", pages)) < 100
    for one in stalled:
        one.close()


def test_a_client_that_reads_slowly_gets_all(monkeypatch):
    monkeypatch.setattr(http_server, "TAKE_SECONDS", 1.0)
    body = bytes(range(256)) * (1 << 13)  # 2 MiB, more than the system holds for a connection

    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    server = http_server.HttpServer("127.0.0.1", 0)
    server.start(answer)
    try:
        client = send_and_read_nothing(server.url, request("GET", "/").replace(b"Host: a", b"Host: a\r\nConnection: close"))
        received = b""
        while data := client.recv(1 << 16):
            received += data
            time.sleep(0.1 * len(data) / (1 << 16))  # several times as long as one wait
        assert received.partition(b"\r\n\r\n")[2] == body
    finally:
        server.stop()
