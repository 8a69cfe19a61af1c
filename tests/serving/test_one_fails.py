"""Eight sequences are answered together and something fails in one: the others get what they get alone, the server goes on."""

import queue
import re

import numpy as np
import pytest

from telechat.generation.sampling import SamplingParams
from telechat.parallel.mesh import Mesh
from telechat.serving import log as log_module
from telechat.serving.answer import FAILURES
from telechat.serving.answer_text import AnswerText
from telechat.serving.app import _hand_out
from telechat.serving.metrics import Metrics
from telechat.serving.service import Choice, Service
from tests.serving.conftest import CountingEngine

FAILED = 3
TOKENS = 5


class Failing(CountingEngine):
    """Logits of token 403 are not finite, a prompt that ends with 399 has no place."""

    def prefill(self, slots, prompts, starts=None):
        if any(prompt[-1] == 399 for prompt in prompts):
            raise ValueError("no place for this prompt")
        return super().prefill(slots, prompts)

    def decode(self, slots, tokens, positions):
        logits = super().decode(slots, tokens, positions)
        logits[[token == 403 for token in tokens]] = np.nan
        return logits


class Breaking:
    """A text or a client that fails at its third piece."""

    def __init__(self, inner, method):
        self.inner = inner
        self.method = method
        self.calls = 0

    def __getattr__(self, name):
        value = getattr(self.inner, name)
        if name != self.method:
            return value

        def call(*arguments):
            self.calls += 1
            if self.calls == 3:
                raise KeyError(f"{name} fails")
            return value(*arguments)

        return call


def answers(service, choices):
    """The text and reason of each choice."""
    service.submit(choices)
    service.stopping = True
    service.run()
    ends = []
    for choice in choices:
        events = list(choice.listener.queue)
        ends.append(("".join(event.text for event in events), [event.reason for event in events if event.reason]))
    return ends


@pytest.mark.parametrize("place, reasons, reason", [
    ("sampling", ["error"], "FloatingPointError: the model's logits are not finite"),
    ("prompt", ["error"], "ValueError: no place for this prompt"),
    ("text", ["error"], "KeyError: 'put fails'"),
    ("end of the text", ["error"], "KeyError: 'end fails'"),
    ("client", ["length"], "KeyError: 'put_nowait fails'"),
])
def test_the_others_are_answered(place, reasons, reason, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(log_module.log, "_next", 0.0)
    service = Service(Failing(slots=8, length=64, vocabulary=1664), Mesh.single().world, Metrics(), queue_limit=3)
    service.deliver = _hand_out
    starts = [600 + 10 * number for number in range(8)]
    starts[FAILED] = {"sampling": 400, "prompt": 399}.get(place, starts[FAILED])
    choices = [Choice([5, start], SamplingParams(TOKENS), 0, AnswerText(tokenizer), queue.Queue()) for start in starts]
    failing = choices[FAILED]
    if place == "text":
        failing.text = Breaking(failing.text, "put")
    if place == "end of the text":
        failing.text = Breaking(failing.text, "end")
        failing.text.calls = 2
    if place == "client":
        failing.listener = Breaking(failing.listener, "put_nowait")
    ends = answers(service, choices)
    for number, (start, end) in enumerate(zip(starts, ends)):
        if number != FAILED:
            assert end == (tokenizer.decode(range(start + 1, start + 1 + TOKENS), skip_control_tokens=True), ["length"])
    assert ends[FAILED][1] == reasons
    assert re.search(re.escape(reason), capsys.readouterr().err)
    assert service.running == service.waiting == 0
    # The place is free again, and used.
    service.stopping = False
    again = [Choice([5, 700], SamplingParams(2), 0, AnswerText(tokenizer), queue.Queue()) for _ in range(8)]
    assert [end[1] for end in answers(service, again)] == [["length"]] * 8


def test_a_delivery_that_fails_is_no_end(tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(log_module.log, "_next", 0.0)
    service = Service(CountingEngine(), Mesh.single().world, Metrics())

    def closed(events):
        raise RuntimeError("Event loop is closed")

    service.deliver = closed
    service.submit([Choice([5], SamplingParams(3), 0, AnswerText(tokenizer), queue.Queue())])
    service.stopping = True
    service.run()
    assert service.running == 0
    assert "answers could not be delivered: RuntimeError: Event loop is closed" in capsys.readouterr().err


def test_failures_are_told_with_a_status_that_clients_try_again_after():
    assert {reason: (error.status, error.code, error.body()["error"]["type"]) for reason, error in FAILURES.items()} == {
        "timeout": (504, "timeout", "server_error"), "error": (500, "answer_failed", "server_error"),
        "failure": (500, "failure", "server_error")}
