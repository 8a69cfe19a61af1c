"""Wrong requests to a server: each is refused in one sentence that names the field."""

import dataclasses

import pytest

from telechat import TeleChatConfig
from telechat.generation.settings import GenerationSettings
from telechat.serving import protocol
from telechat.serving.api_error import APIError


def chat(**fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}


def said(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


REQUESTS = [
    ({"model": None}, "model"), ({"model": 3}, "model"), ({"model": "gpt"}, "model"), ({"messages": None}, "messages"),
    ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{}]}, "messages[0]"), ({"messages": [{"role": "user"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages[0]"),
    (said("assistant"), "messages"), (said("user", "assistant"), "messages"), (said("assistant", "user"), "messages"),
    (said("system", "user"), "messages[0]"), (said("developer", "user"), "messages[0]"), (said("tool"), "messages[0]"),
    (said(7), "messages[0]"), (said("system"), "messages[0]"), ({"temperature": -1}, "temperature"),
    ({"temperature": 3}, "temperature"), ({"temperature": "1"}, "temperature"), ({"temperature": True}, "temperature"),
    ({"temperature": [1]}, "temperature"), ({"top_p": 1.1}, "top_p"), ({"top_p": -0.1}, "top_p"), ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"), ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"), ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 129}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"), ({"max_tokens": "9"}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"), ({"max_tokens": 128}, "messages"),
    ({"messages": [{"role": "user", "content": "话" * 500}]}, "messages"), ({"n": 0}, "n"), ({"n": 17}, "n"),
    ({"n": 1.0}, "n"), ({"seed": 1.5}, "seed"), ({"seed": 1 << 65}, "seed"), ({"stop": 3}, "stop"), ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 5}, "stop"), ({"stop": ["a", 1]}, "stop"), ({"stop": "x" * 257}, "stop"), ({"stream": 1}, "stream"),
    ({"stream_options": 1}, "stream_options"), ({"stream_options": {"include_usage": 1}}, "stream_options"),
    ({"drop_oldest": "yes"}, "drop_oldest"), ({"logprobs": True}, "logprobs"), ({"top_logprobs": 3}, "top_logprobs"),
    ({"logit_bias": {"5": 1}}, "logit_bias"), ({"tools": [{}]}, "tools"), ({"functions": [1]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"), ({"modalities": ["audio"]}, "modalities"),
    ({"temprature": 1}, "temprature"), ({"x" * 100: 1}, "x" * 60),
]


@pytest.fixture(scope="module")
def model(places):
    config = TeleChatConfig.from_pretrained(places["ckpt"])
    return protocol.Model("tiny", GenerationSettings.load(places["ckpt"], config), 128, config.vocab_size)


@pytest.mark.parametrize("fields, param", REQUESTS, ids=range(len(REQUESTS)))
def test_wrong_requests(fields, param, model):
    with pytest.raises(APIError) as refused:
        protocol.read_chat(chat(**fields), model)
    assert refused.value.status == (404 if fields == {"model": "gpt"} else 400)
    assert refused.value.param == param
    assert param.split("[")[0] in refused.value.message and "\n" not in refused.value.message
    assert len(refused.value.message) < 300


@pytest.mark.parametrize("prompt", [None, 3, [], "", [[]], ["a", 3], [1664], [-1], [True], {"a": 1}, ["a"] * 17, "话" * 500])
def test_wrong_prompts(prompt, model):
    with pytest.raises(APIError) as refused:
        protocol.read_completion({"model": "tiny", "prompt": prompt}, model)
    assert refused.value.status == 400 and refused.value.param == "prompt" and "prompt" in refused.value.message \
        or "token id" in refused.value.message


def test_a_system_message_may_be_put_before_the_question(model):
    prepending = dataclasses.replace(model, system="prepend")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    asked = protocol.read_chat({"model": "tiny", "messages": messages}, prepending).prompts
    assert asked == protocol.read_chat(chat(messages=[{"role": "user", "content": "be brief\nhi"}]), model).prompts
    with pytest.raises(APIError, match="first"):
        protocol.read_chat({"model": "tiny", "messages": [messages[1], messages[0], messages[1]]}, prepending)
