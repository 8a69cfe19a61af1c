"""Events of a stream as clients read them, those too that cut lines where Python's str.splitlines does."""

import json
import logging

from hypothesis import given, settings
from hypothesis import strategies as st

from telechat.serving import http_server
from telechat.serving.answer import server_sent_event
from telechat.serving.log import Log


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(st.text(st.sampled_from("ab你🙂\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r\n\t\"\\\\")))
def test_an_event_is_one_line_however_lines_are_cut(text):
    event = server_sent_event({"choices": [{"delta": {"content": text}}]})
    line, nothing = event.splitlines()
    assert nothing == "" and event == line + "\n\n"
    assert json.loads(line.removeprefix("data: ")) == {"choices": [{"delta": {"content": text}}]}


def test_chinese_is_not_escaped():
    assert server_sent_event({"text": "你\u2028好"}) == 'data: {"text": "你\\u2028好"}\n\n'


def test_what_asyncio_says_is_a_line_a_second(monkeypatch, capsys):
    monkeypatch.setattr(http_server, "log", Log())
    logger = logging.Logger("asyncio")
    logger.addHandler(http_server._Lines())
    for _ in range(100):
        logger.warning("socket.send() raised exception.")
    for _ in range(100):
        http_server._report(None, {"message": "it failed", "exception": OSError(24, "Too many open files")})
    assert capsys.readouterr().err == "asyncio: socket.send() raised exception.\n"
    http_server.log = Log()
    http_server._report(None, {"message": "it failed", "exception": OSError(24, "Too many open files")})
    assert capsys.readouterr().err == "it failed: OSError: [Errno 24] Too many open files\n"
