"""Requests that nobody should send: each is refused in OpenAI's form, and the server goes on."""

import base64
import http.client
import json
import urllib.parse

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.conftest import KEY

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


class Raw:
    """Sends bytes as they are over one kept connection."""

    def __init__(self, url):
        self.address = urllib.parse.urlparse(url).netloc
        self.connection = http.client.HTTPConnection(self.address, timeout=60)

    def __call__(self, method, path, body=b"", key=KEY, headers=()):
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {}),
                   **dict(headers)}
        try:
            self.connection.request(method, path, body, headers)
            response = self.connection.getresponse()
            return response.status, response.read()
        except (ConnectionError, http.client.RemoteDisconnected):
            self.connection.close()
            return None, b""  # a closed connection


@pytest.fixture(scope="module")
def raw(server):
    sender = Raw(server.url)
    yield sender
    sender.connection.close()


def good(**fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, **fields}


@pytest.mark.parametrize("body, status, words", [
    (b"", 400, "JSON"), (b"{", 400, "JSON"), (b"[1]", 400, "object"), (b"null", 400, "object"),
    (b'{"a": NaN}', 400, "NaN"), (b'{"a": "\xff"}', 400, "UTF-8"), (b'{"model": "\\ud800"}', 400, "surrogate"),
    (b"[" * 10_000 + b"]" * 10_000, 400, "nested"), (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, 400, "nested"),
    (b'{"model": ' + b"9" * 5000 + b"}", 400, "JSON"), (b" " * (1 << 20) + b"{}", 413, "1048576"),
], ids=["empty", "broken", "list", "null", "NaN", "invalid UTF-8", "half a surrogate", "10,000 lists", "10,000 objects",
        "5,000 digits", "too large"])
def test_bodies(raw, body, status, words):
    given_status, answer = raw("POST", CHAT, body)
    assert given_status == status and words in json.loads(answer)["error"]["message"]


@pytest.mark.parametrize("field, value, said", [("best_of", 2, "best_of is not supported; leave it out"),
                                                ("num_beams", 4, "there is no field 'num_beams' here; leave it out")])
def test_beams_are_refused_by_name(raw, field, value, said):
    status, answer = raw("POST", CHAT, json.dumps(good(**{field: value})).encode())
    assert status == 400 and json.loads(answer)["error"]["message"] == said


def test_a_chunked_body_that_is_too_large(raw):
    chunks = (b" " * 65536 for _ in range(20))
    status, _ = raw("POST", CHAT, chunks, headers={"Transfer-Encoding": "chunked"}.items())
    assert status in (413, None)
    assert raw("GET", "/health")[0] == 200


def test_other_content_types_and_methods_and_paths(raw):
    assert raw("POST", CHAT, b"{}", headers={"Content-Type": "text/plain"}.items())[0] == 415
    for method, path, status in (("GET", CHAT, 405), ("DELETE", "/", 405), ("GET", "/v2", 404), ("GET", "/%ff%00", 404)):
        answer = raw(method, path)
        assert answer[0] == status and "message" in json.loads(answer[1])["error"]


def test_without_the_key_only_health_answers(raw):
    for key in (None, "wrong", "", KEY + "x", "密"):
        for method, path in (("GET", "/"), ("GET", "/metrics"), ("GET", "/v1/models"), ("POST", CHAT), ("GET", "/nowhere"),
                             ("POST", COMPLETION)):
            status, answer = raw(method, path, json.dumps(good()).encode(), key and key.encode().decode("latin-1"))
            assert status == 401 and json.loads(answer)["error"]["code"] == "invalid_api_key"
        assert raw("GET", "/health", key=None) == (200, b'{"status":"ok"}')
    basic = base64.b64encode(f"anyone:{KEY}".encode()).decode()
    for header, status in ((f"Basic {basic}", 200), ("Basic !", 401), (f"Digest {KEY}", 401), (f"bearer {KEY}", 200)):
        assert raw("GET", "/v1/models", key=None, headers={"Authorization": header}.items())[0] == status


# A word or two that each field is sure to reject, or a value that costs little where it is right.
JUNK = st.recursive(st.none() | st.booleans() | st.integers(-9, 1 << 70) | st.floats() | st.text(max_size=20),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
                    max_leaves=6)
COUNTS = JUNK.filter(lambda value: isinstance(value, bool) or not isinstance(value, int) or not 2 < value <= 1024)
MESSAGES = st.lists(st.fixed_dictionaries({}, optional={
    "role": st.sampled_from(["user", "assistant", "system", "tool"]) | JUNK, "content": st.text(max_size=30) | JUNK}),
    max_size=4)
FIELDS = {"messages": MESSAGES | JUNK, "prompt": st.text(max_size=30) | st.lists(st.integers(-2, 1700), max_size=5) | JUNK,
          "max_tokens": COUNTS, "max_completion_tokens": COUNTS, "n": st.integers(-1, 20) | JUNK,
          **{name: st.floats(-3, 3) | JUNK for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty",
                                                       "repetition_penalty")},
          **{name: JUNK for name in ("model", "seed", "top_k", "stop", "stream", "stream_options", "logit_bias", "logprobs",
                                     "user", "tools", "response_format", "drop_oldest", "echo", "anything")}}


@settings(max_examples=1000, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from([CHAT, COMPLETION]), data=st.data())
def test_a_thousand_requests_find_no_server_error(raw, path, data):
    base = good() if path == CHAT else {"model": "tiny", "prompt": "hi", "max_tokens": 1}
    names = data.draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=3, unique=True))
    body = {**base, **{name: data.draw(FIELDS[name], label=name) for name in names}}
    if body.get("max_tokens", 1) is None:
        body["max_tokens"] = 1  # without it an answer is as long as it gets
    encoded = json.dumps(body).encode()
    if data.draw(st.integers(0, 9)) == 0:
        place = data.draw(st.integers(0, len(encoded) - 1))
        encoded = encoded[:place] + data.draw(st.binary(max_size=4)) + encoded[place + 1:]
    status, answer = raw("POST", path, encoded)
    if status is None:  # the server closes a connection that was idle for long, as on a machine that paused
        status, answer = raw("POST", path, encoded)
    assert status == 200 or 400 <= status < 500, (status, answer)
    if status != 200:
        error = json.loads(answer)["error"]
        assert error["message"] and error["type"] == "invalid_request_error"


def test_the_server_is_still_well(raw):
    assert raw("GET", "/health")[0] == 200
    assert raw("POST", CHAT, json.dumps(good()).encode())[0] == 200
