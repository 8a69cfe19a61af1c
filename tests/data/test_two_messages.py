"""Two messages of one role in a row: one, joined by a newline, in training data, a chat and the server alike."""

import pytest

from telechat import TeleChatConfig
from telechat.data.conversation import ChatFormat, join_messages, parse_conversation
from telechat.data.encoding import encode_conversation
from telechat.generation.chat import build_prompt
from telechat.generation.settings import GenerationSettings
from telechat.serving import protocol

SAID = [("user", "一"), ("user", "why"), ("bot", "三"), ("bot", "so"), ("user", "五"), ("user", ""), ("user", "1 + 1")]
TURNS = [("一\nwhy", "三\nso"), ("五\n1 + 1", "")]


def test_joining():
    assert join_messages(SAID) == [("user", "一\nwhy"), ("bot", "三\nso"), ("user", "五\n1 + 1")]
    assert join_messages([]) == [] and join_messages([("user", ""), ("user", "")]) == [("user", "")]


def test_in_training_data():
    openai = {"user": "user", "bot": "assistant"}
    record = {"messages": [{"role": openai[role], "content": text} for role, text in [*SAID, ("bot", "x")]]}
    assert parse_conversation(record) == [TURNS[0], (TURNS[1][0], "x")]
    marked = "".join(f"<_{role}>{text}" for role, text in SAID)
    assert parse_conversation({"input": marked, "output": "x"}) == [TURNS[0], (TURNS[1][0], "x")]


@pytest.fixture
def expected(tok):
    """The prompt of those turns as training has them."""
    ids, _ = encode_conversation(tok, ChatFormat.for_tokenizer(tok), TURNS)
    return ids[:-1]


@pytest.mark.parametrize("fit", [False, True])
def test_in_a_chat(tok, expected, fit):
    history = [{"role": role, "content": text} for role, text in SAID[:-1]]
    assert build_prompt(tok, history, SAID[-1][1], 512, fit=fit) == expected


def test_in_the_server(tok, expected, samples):
    config = TeleChatConfig(vocab_size=1664, hidden_size=32, n_layer=1, n_head=4, ffn_hidden_size=48)
    model = protocol.Model("m", GenerationSettings.load(samples, config), 512, config.vocab_size)
    roles = {"user": "user", "bot": "assistant"}
    body = {"model": "m", "messages": [{"role": roles[role], "content": text} for role, text in SAID]}
    assert protocol.read_chat(body, model).prompts == [expected]
