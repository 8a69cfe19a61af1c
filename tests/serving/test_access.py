"""Who may come in: browsers' pages of other origins, paths as clients write them, and where the key comes from."""

import asyncio
import dataclasses
import json
import subprocess
import sys

import pytest
from starlette.datastructures import Headers

from telechat import InputError
from telechat.serving.access import AccessMiddleware, read_origin
from telechat.serving.api_error import APIError
from telechat.serving.api_key import read_api_key
from telechat.serving.app import _refused
from telechat.serving.metrics import Metrics
from tests.conftest import ROOT, load_tool

OTHER = "http://localhost:3000"


@dataclasses.dataclass
class Answer:
    status: int
    headers: Headers
    body: bytes
    metrics: str

    @property
    def error(self):
        return json.loads(self.body)["error"]


def ask(method, path, origins=(), api_key="k", **headers):
    """The answer of a server at http://telechat:8000, behind which an application spells out the path."""
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["path"].encode()})

    metrics, sent = Metrics(), []
    access = AccessMiddleware(app, api_key, metrics, {"/v1/models"}, origins)
    given = [(b"host", b"telechat:8000")]
    given += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]

    async def send(message):
        sent.append(message)

    asyncio.run(access({"type": "http", "method": method, "path": path, "headers": given}, None, send))
    return Answer(sent[0]["status"], Headers(raw=sent[0]["headers"]), sent[1]["body"], metrics.text(0, 0))


PREFLIGHT = dict(access_control_request_method="POST", access_control_request_headers="authorization,x-stainless-os")


@pytest.mark.parametrize("origin, origins, allowed", [
    (OTHER, (OTHER,), OTHER), ("HTTP://LocalHost:3000", (OTHER,), "HTTP://LocalHost:3000"), (OTHER, ("*",), "*"),
    ("null", ("null",), "null"), ("http://telechat:8000", (), "http://telechat:8000"),
    ("https://telechat:8000", (OTHER,), "https://telechat:8000"),
    (OTHER, (), None), ("http://localhost:3001", (OTHER,), None), ("null", (OTHER,), None), ("", (OTHER,), None),
    ("http://telechat:8001", (OTHER,), None), ("http://localhost:3000.evil.example", (OTHER,), None),
])
def test_preflights_and_answers(origin, origins, allowed):
    """A preflight is answered without the key; answers, refusals too, say who may read them."""
    answer = ask("OPTIONS", "/v1/chat/completions", origins, origin=origin, **PREFLIGHT)
    assert answer.headers.get("access-control-allow-origin") == allowed
    if allowed is None:
        assert answer.status == 403 and "--allow_origin" in answer.error["message"]
        assert answer.error["code"] == "origin_not_allowed"
    else:
        assert (answer.status, answer.body) == (204, b"")
        assert answer.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
        assert answer.headers["access-control-allow-methods"] == "GET, POST, OPTIONS"
    for key, status in (("k", 200), ("x", 401)):
        answer = ask("POST", "/v1/chat/completions", origins, origin=origin, authorization=f"Bearer {key}")
        assert answer.status == status and answer.headers.get("access-control-allow-origin") == allowed
        assert answer.headers.get("vary") == ("Origin" if origins else None)


def test_without_an_origin_nothing_is_said():
    answer = ask("GET", "/v1/models", (OTHER,), authorization="Bearer k")
    assert answer.status == 200 and "access-control-allow-origin" not in answer.headers
    answer = ask("OPTIONS", "/v1/models", (OTHER,))
    assert answer.status == 401, "no preflight"


@pytest.mark.parametrize("text, origin", [
    ("http://localhost:3000/", OTHER), ("HTTPS://Chat.Example", "https://chat.example"), ("*", "*"), ("null", "null"),
    ("app://obsidian.md", "app://obsidian.md"), ("http://[::1]:3000", "http://[::1]:3000"),
])
def test_origins(text, origin):
    assert read_origin(text) == origin


@pytest.mark.parametrize("text", ["localhost:3000", "http://", "http://a/b", "http://a?b", "http://u@a", "http://a b", ""])
def test_what_is_no_origin(text):
    with pytest.raises(InputError, match="--allow_origin .*is not an origin; give scheme, host and port alone"):
        read_origin(text)


@pytest.mark.parametrize("path, read", [("/v1/models/", "/v1/models"), ("/v1//models", "/v1/models"), ("//", "/"),
                                        ("/v1/models", "/v1/models"), ("//v1//models//", "/v1/models")])
def test_slashes(path, read):
    answer = ask("GET", path, authorization="Bearer k")
    assert answer.body.decode() == read
    assert f'path="{read if read == "/v1/models" else "other"}",status="200"' in answer.metrics


def test_where_the_key_comes_from(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(b"\xef\xbb\xbfsk-file \r\n")
    assert read_api_key(None, None, {}) is None
    assert read_api_key(None, str(path), {"TELECHAT_API_KEY": "sk-variable"}) == "sk-file"
    assert read_api_key("sk-flag", None, {"TELECHAT_API_KEY": "sk-variable"}) == "sk-flag"
    assert read_api_key("x" * 4096, None, {}) == "x" * 4096
    assert read_api_key(None, None, {"TELECHAT_API_KEY": "sk-variable"}) == "sk-variable"


@pytest.mark.parametrize("secret", ["sk-one\nsk-two", "", "\n", "sk-密", "sk\x00one", "x" * 4097])
def test_what_is_no_key_is_not_told(secret, tmp_path):
    path = tmp_path / "key"
    path.write_text(secret, encoding="utf-8")
    for arguments, source in (((None, str(path), {}), f"--api_key_file {path}"), ((secret, None, {}), "--api_key"),
                              ((None, None, {"TELECHAT_API_KEY": secret}), "the variable TELECHAT_API_KEY")):
        with pytest.raises(InputError) as refused:
            read_api_key(*arguments)
        assert str(refused.value) == f"{source} must be one line of printable ASCII characters, without spaces around " \
                                     "them and not empty"


@pytest.mark.parametrize("status, later", [(400, None), (429, "1"), (500, None), (503, "1")])
def test_a_client_is_told_to_try_again_where_that_helps(status, later):
    answer = asyncio.run(_refused(None, APIError(status, "no")))
    assert answer.status_code == status and answer.headers.get("retry-after") == later


def test_files_that_hold_no_key(tmp_path):
    for path, reason in ((tmp_path / "absent", "cannot be read (No such file or directory)"),
                         (tmp_path, "cannot be read (Is a directory)")):
        with pytest.raises(InputError, match="--api_key_file") as refused:
            read_api_key(None, str(path), {})
        assert f"{path} {reason}; give a file with the key" in str(refused.value)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="binary is not text"):
        read_api_key(None, str(tmp_path / "binary"), {})
    with pytest.raises(InputError, match="give --api_key or --api_key_file, not both"):
        read_api_key("a", "b", {})


def test_a_key_among_the_arguments_is_hidden():
    """From ps, which reads what this reads, and from what a traceback's file says of the call."""
    code = "import sys; from telechat.serving.api_key import hide_argument; hide_argument('sk-secret'); " \
           "print(open('/proc/self/cmdline').read().split('\\0')[3:], sys.argv[1:])"
    shown = subprocess.run([sys.executable, "-c", code, "--api_key", "sk-secret", "--api_key=sk-secret", "--port", "1"],
                           cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown == "['--api_key', 'xxxxxxxxx', '--api_key=xxxxxxxxx', '--port', '1', ''] " \
                    "['--api_key', '…', '--api_key=…', '--port', '1']\n"


def test_among_several_processes_a_key_in_the_arguments_is_refused(monkeypatch, checkpoint):
    """The launcher's own arguments show it for as long as the job runs."""
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    with pytest.raises(InputError) as refused:
        load_tool("serve").main(["--load_checkpoint", str(checkpoint), "--api_key", "sk-secret"])
    assert str(refused.value) == "--api_key would show in the list of processes, where the launcher's arguments stay; give " \
                                 "--api_key_file or the variable TELECHAT_API_KEY"
