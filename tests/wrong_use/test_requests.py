"""Wrong requests to a server: each is refused in one sentence that names the field, the value and what to do."""

import dataclasses
import re

import pytest

from telechat import TeleChatConfig
from telechat.generation.settings import GenerationSettings
from telechat.serving import protocol
from telechat.serving.api_error import APIError


def chat(**fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}


def said(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


FORM = " must be an object with role and content"
TEXT = '.content must be a text, or a list of {"type": "text", "text": …}'
TURNED_AWAY = " is a system message, and TeleChat was not trained with one; put it into the question, or start the server " \
              "with --system prepend"
STOPS = "stop must be a text or a list of at most 4, each of 1 to 256 characters"
# What is asked for, the field that is named, and the whole reason.
REQUESTS = [
    ({"model": None}, "model", "model must be a text: 'tiny'"), ({"model": 3}, "model", "model must be a text: 'tiny'"),
    ({"model": "gpt"}, "model", "there is no model 'gpt' here; this server has 'tiny'"),
    *[({"messages": value}, "messages", "messages must be a list with at least one message") for value in (None, [], "hi")],
    ({"messages": ["hi"]}, "messages[0]", "messages[0]" + FORM),
    *[({"messages": [message]}, "messages[0]", "messages[0]" + TEXT)
      for message in ({}, {"role": "user"}, {"role": "user", "content": 3}, {"role": "user", "content": []},
                      {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]})],
    ({"messages": [*said("user")["messages"], {"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]}]}, "messages[1]",
     "messages[1].tool_calls: this model was not trained with tools; leave them out"),
    (said("assistant"), "messages", "the last of messages must be the user's"),
    (said("user", "assistant"), "messages", "the last of messages must be the user's"),
    (said("assistant", "user"), "messages", "the first of messages must be the user's"),
    (said("system", "user"), "messages[0]", "messages[0]" + TURNED_AWAY),
    (said("developer", "user"), "messages[0]", "messages[0]" + TURNED_AWAY),
    (said("system"), "messages[0]", "messages[0]" + TURNED_AWAY),
    (said("tool"), "messages[0]", 'messages[0].role must be "user", "assistant" or "system", not \'tool\''),
    (said(7), "messages[0]", 'messages[0].role must be "user", "assistant" or "system", not \'7\''),
    *[({"temperature": value}, "temperature", f"temperature must be a number from 0 to 2, not {shown}")
      for value, shown in ((-1, "-1"), (3, "3"), ("1", '"1"'), (True, "true"), ([1], "[1]"))],
    *[({"top_p": value}, "top_p", f"top_p must be a number from 0 to 1, not {value}") for value in (1.1, -0.1)],
    *[({"top_k": value}, "top_k", f"top_k must be a whole number from 0 to 2147483648, not {value}") for value in (-1, 1.5)],
    ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty must be a number from 0.01 to 100, not 0"),
    ({"presence_penalty": 2.5}, "presence_penalty", "presence_penalty must be a number from -2 to 2, not 2.5"),
    ({"frequency_penalty": -3}, "frequency_penalty", "frequency_penalty must be a number from -2 to 2, not -3"),
    *[({"max_tokens": value}, "max_tokens", f"max_tokens must be a whole number from 1 to 128, not {shown}")
      for value, shown in ((0, "0"), (-1, "-1"), (129, "129"), (10**30, str(10**30)), (1.5, "1.5"), ("9", '"9"'))],
    ({"max_completion_tokens": 0}, "max_completion_tokens",
     "max_completion_tokens must be a whole number from 1 to 128, not 0"),
    ({"max_tokens": 128}, "messages", " and max_tokens 128 exceed the 128 that this server has for prompt and answer "
                                      "together; shorten them"),
    ({"messages": [{"role": "user", "content": "话" * 500}]}, "messages",
     " tokens exceed the 128 that this server has for prompt and answer together; shorten them"),
    *[({"n": value}, "n", f"n must be a whole number from 1 to 16, not {value}") for value in (0, 17, 1.0)],
    ({"seed": 1.5}, "seed", "seed must be a whole number from -9223372036854775808 to 18446744073709551615, not 1.5"),
    ({"seed": 1 << 65}, "seed", "seed must be a whole number from -9223372036854775808 to 18446744073709551615, not "
                                "36893488147419103232"),
    *[({"stop": value}, "stop", STOPS) for value in (3, "", ["a"] * 5, ["a", 1], "x" * 257)],
    ({"stream": 1}, "stream", "stream must be true or false, not 1"),
    *[({"stream_options": value}, "stream_options", 'stream_options must be {"include_usage": true or false}')
      for value in (1, {"include_usage": 1})],
    ({"drop_oldest": "yes"}, "drop_oldest", 'drop_oldest must be true or false, not "yes"'),
    ({"logprobs": 5}, "logprobs", "logprobs must be true or false, not 5"),
    ({"top_logprobs": 3}, "top_logprobs", "top_logprobs 3 goes with logprobs true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs must be a whole number from 0 to 20, not 21"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "top_logprobs must be a whole number from 0 to 20, not -1"),
    *[({name: value}, name, f"{name} is not supported; leave it out")
      for name, value in (("logit_bias", {"5": 1}), ("tools", [{}]), ("functions", [1]), ("modalities", ["audio"]))],
    *[({"response_format": value}, "response_format", f'response_format {shown} is not supported, {{"type": "text"}} alone; '
       "ask for the form you want in the question")
      for value, shown in (({"type": "json_object"}, '"json_object"'), ("text", '"text"'), ({}, "null"), ([], "[]"),
                           ({"type": "json_schema", "json_schema": {}}, '"json_schema"'))],
    ({"temprature": 1}, "temprature", "there is no field 'temprature' here; leave it out"),
    ({"x" * 100: 1}, "x" * 60, f"there is no field '{'x' * 60}' here; leave it out"),
]


@pytest.fixture(scope="module")
def model(places):
    config = TeleChatConfig.from_pretrained(places["ckpt"])
    return protocol.Model("tiny", GenerationSettings.load(places["ckpt"], config), 128, config.vocab_size)


@pytest.mark.parametrize("fields, param, reason", REQUESTS, ids=range(len(REQUESTS)))
def test_wrong_requests(fields, param, reason, model):
    with pytest.raises(APIError) as refused:
        protocol.read_chat(chat(**fields), model)
    assert refused.value.status == (404 if fields == {"model": "gpt"} else 400)
    assert refused.value.param == param
    if reason.startswith(" "):  # the number of tokens goes before
        assert re.fullmatch(r"messages of \d+( tokens)?" + re.escape(reason), refused.value.message)
    else:
        assert refused.value.message == reason


ONE_OF = "prompt must be a text, a list of token ids, or a list of 1 to 16 of these"
WRONG_PROMPTS = [
    *[(prompt, re.escape(ONE_OF)) for prompt in (None, 3, [], {"a": 1}, ["a"] * 17)],
    *[(prompt, "a prompt must hold at least one token") for prompt in ("", [[]])],
    *[(prompt, "each prompt must be a text or a list of token ids") for prompt in (["a", 3], [True])],
    *[([token], f"token id {token} is outside the vocabulary of 1664") for token in (1664, -1)],
    ("话" * 500, r"prompt of \d+ tokens exceed the 128 that this server has for prompt and answer together; shorten them"),
]


@pytest.mark.parametrize("prompt, reason", WRONG_PROMPTS, ids=range(len(WRONG_PROMPTS)))
def test_wrong_prompts(prompt, reason, model):
    with pytest.raises(APIError) as refused:
        protocol.read_completion({"model": "tiny", "prompt": prompt}, model)
    assert refused.value.status == 400 and refused.value.param == "prompt"
    assert re.fullmatch(reason, refused.value.message)


def test_the_first_and_the_last_token_of_the_vocabulary_may_be_asked_for(model):
    assert protocol.read_completion({"model": "tiny", "prompt": [0, 1663]}, model).prompts == [[0, 1663]]


@pytest.mark.parametrize("fields, reason", [
    ({"logprobs": True}, "logprobs must be a whole number from 0 to 20, not true"),
    ({"logprobs": 21}, "logprobs must be a whole number from 0 to 20, not 21"),
    ({"top_logprobs": 2}, "top_logprobs is not supported; leave it out"),
    ({"n": 9, "prompt": ["a", "b"]}, "n times the number of prompts must be at most 16"),
])
def test_wrong_completions(fields, reason, model):
    with pytest.raises(APIError) as refused:
        protocol.read_completion({"model": "tiny", "prompt": "hi", **fields}, model)
    assert refused.value.message == reason


def test_what_is_asked_for_reaches_the_sampler(model):
    asked = protocol.read_chat(chat(response_format={"type": "text"}), model).params
    assert asked.logprobs is None and asked.excluded_ids == model.settings.excluded_ids
    assert protocol.read_chat(chat(logprobs=True), model).params.logprobs == 0
    assert protocol.read_chat(chat(logprobs=True, top_logprobs=20), model).params.logprobs == 20
    assert protocol.read_chat(chat(logprobs=False, top_logprobs=0), model).params.logprobs is None
    for given, wanted in ((None, None), (False, None), (0, 0), (20, 20)):
        body = {"model": "tiny", "prompt": "hi", "logprobs": given}
        assert protocol.read_completion(body, model).params.logprobs == wanted


def test_a_system_message_may_be_put_before_the_question(model):
    prepending = dataclasses.replace(model, system="prepend")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    asked = protocol.read_chat({"model": "tiny", "messages": messages}, prepending).prompts
    assert asked == protocol.read_chat(chat(messages=[{"role": "user", "content": "be brief\nhi"}]), model).prompts
    with pytest.raises(APIError, match="first"):
        protocol.read_chat({"model": "tiny", "messages": [messages[1], messages[0], messages[1]]}, prepending)


@pytest.mark.parametrize("body, reason", [
    (b"", "the body is not JSON: Expecting value: line 1 column 1 (char 0)"),
    (b"{", "the body is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    (b"[1]", "the body must be a JSON object"), (b"null", "the body must be a JSON object"),
    (b'{"a": NaN}', "the body is not JSON: NaN is not a JSON number"),
    (b'{"a": -Infinity}', "the body is not JSON: -Infinity is not a JSON number"),
    (b'{"a": "\xff"}', "the body is not UTF-8 (byte 7)"),
    (b'{"model": "\\ud800"}', "the body holds half of a surrogate pair; write the whole character"),
    (b"[" * 10_000 + b"]" * 10_000, "the body is nested too deeply"),
])
def test_wrong_bodies(body, reason):
    with pytest.raises(APIError) as refused:
        protocol.parse_body(body)
    assert (refused.value.status, refused.value.message, refused.value.param) == (400, reason, None)
    assert refused.value.body()["error"] == {"message": reason, "type": "invalid_request_error", "param": None, "code": None}


@pytest.mark.parametrize("status, kind", [(400, "invalid_request_error"), (404, "invalid_request_error"),
                                          (429, "rate_limit_error"), (500, "server_error"), (503, "server_error")])
def test_kinds_of_errors(status, kind):
    assert APIError(status, "x", "y", "z").body() == {"error": {"message": "x", "type": kind, "param": "y", "code": "z"}}


def test_a_whole_number_may_be_5000_digits_long_and_is_told_in_short(model):
    with pytest.raises(APIError, match="^the body is not JSON: "):
        protocol.parse_body(b'{"n": ' + b"9" * 5000 + b"}")
    with pytest.raises(APIError) as refused:
        protocol.read_chat(chat(n=10**60), model)
    assert refused.value.message == f"n must be a whole number from 1 to 16, not {'1' + '0' * 39}…"
