"""Thoughts and calls of tools of TeleChat2 and 3 over the real HTTP app, asked by OpenAI's own client.

The engine says a script: what the model would answer is written down as tokens.
"""

import asyncio
import json
import shutil
import threading

import numpy as np
import openai
import pytest

from telechat import Tokenizer
from telechat.data.answer_stream import AnswerParts, AnswerStream, spelt_answer
from telechat.data.conversation import ChatFormat
from telechat.generation.chat import build_prompt
from telechat.generation.settings import GenerationSettings
from telechat.parallel.mesh import Mesh
from telechat.serving.app import App
from telechat.serving.metrics import Metrics
from telechat.serving.protocol import Model
from telechat.serving.service import Service
from tests.serving.conftest import TableEngine

try:
    import httpx2 as httpx  # what openai's client is built on; its older versions on httpx
except ImportError:
    import httpx

FILES = {"telechat2": "telechat2_115b", "telechat3": "telechat3_36b", "coder": "telechat3_36b"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


class ScriptedEngine(TableEngine):
    """Stands in for an Engine: every answer is the script, whatever the prompt."""

    def __init__(self, script, vocabulary):
        super().__init__(slots=2, length=4096, reuse=False)
        self.script, self.vocabulary, self.prompts = script, vocabulary, {}

    def prefill(self, slots, prompts, starts=None):
        self.prompts.update(zip(slots, prompts))
        return np.stack([self._logits(0) for _ in prompts])

    def decode(self, slots, tokens, positions):
        return np.stack([self._logits(position - len(self.prompts[slot]) + 1)
                         for slot, position in zip(slots, positions)])

    def _logits(self, place):
        logits = np.zeros(self.vocabulary, np.float32)
        logits[self.script[place]] = 1
        return logits


@pytest.fixture(scope="module")
def tokenizers(shared, tmp_path_factory):
    made = {}
    for name, file in FILES.items():
        folder = tmp_path_factory.mktemp(name)
        shutil.copy(shared / f"data/{file}.tokenizer.model", folder / "tokenizer.model")
        if name == "coder":
            (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ '<param_key>' }}"}))
        tok = Tokenizer.from_pretrained(folder)
        made[name] = tok, ChatFormat.for_tokenizer(tok)
    return made


def written(tok, chat_format, *parts):
    """Ids of texts and of tokens by their names."""
    template = chat_format.template
    names = {**template.tool_tokens, "<think>": template.think, "</think>": template.end_of_thought,
             "<_end>": chat_format.end}
    return [index for part in parts for index in
            ([names[part]] if part in names else tok.encode(part, control_tokens=False))]


@pytest.fixture
def ask(tokenizers):
    """ask(name, script parts, body) → (what openai's client returns or streams, the engine)."""
    def call(name, script, **body):
        tok, chat_format = tokenizers[name]
        engine = ScriptedEngine(written(tok, chat_format, *script), tok.vocab_size)
        settings = GenerationSettings(tok, chat_format, {"temperature": 0.0}, 4096, (chat_format.end,))
        service = Service(engine, Mesh.single().world, Metrics())
        app = App(service, Model("m", settings, 4096, tok.vocab_size))
        loop = threading.Thread(target=service.run)
        loop.start()

        async def run():
            transport = httpx.ASGITransport(app=app.asgi)
            async with httpx.AsyncClient(transport=transport) as http:
                client = openai.AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key="x", http_client=http, max_retries=0)
                body.setdefault("messages", [{"role": "user", "content": "1+1?"}])
                made = await client.chat.completions.create(model="m", **body)
                return [chunk async for chunk in made] if body.get("stream") else made
        try:
            return asyncio.run(run()), engine
        finally:
            service.stopping = True
            loop.join(timeout=30)
    return call


CALL = ("我来算。", "<tool_call>", '\n{"name": "add", "arguments": {"a": 1}}\n', "</tool_call>", "\n", "<tool_call>",
        '\n{"name": "add", "arguments": {"a": 2}}\n', "</tool_call>", "<_end>")


def test_calls_of_tools(ask, tokenizers):
    made, engine = ask("telechat2", CALL, tools=TOOLS)
    choice = made.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "我来算。"
    calls = choice.message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [{"a": 1}, {"a": 2}]
    assert all(call.function.name == "add" and call.type == "function" for call in calls)
    assert len({call.id for call in calls}) == 2
    # The answer goes back as OpenAI's clients send it, with the results, and is written as the template has it.
    messages = [{"role": "user", "content": "1+1?"}, choice.message.model_dump(exclude_none=True),
                *({"role": "tool", "tool_call_id": call.id, "content": "2"} for call in calls)]
    _, engine = ask("telechat2", ("2", "<_end>"), tools=TOOLS, messages=messages)
    history = [{"role": "user", "content": "1+1?"}, {"role": "bot", "content": "我来算。", "tool_calls": [
        {"name": "add", "arguments": {"a": number}} for number in (1, 2)]}, *[{"role": "tool", "content": "2"}] * 2]
    tok, chat_format = tokenizers["telechat2"]
    assert engine.prompts[0] == build_prompt(tok, history, None, 1 << 20, chat_format, tools=TOOLS)


def test_calls_are_streamed_whole_and_in_order(ask):
    chunks, _ = ask("telechat2", CALL, tools=TOOLS, stream=True)
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [(call.index, json.loads(call.function.arguments)) for call in calls] == [(0, {"a": 1}), (1, {"a": 2})]
    assert "".join(delta.content or "" for delta in deltas) == "我来算。"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_without_tools_a_call_is_text(ask):
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        made, _ = ask("telechat2", CALL, **options)
        assert made.choices[0].finish_reason == "stop" and made.choices[0].message.tool_calls is None
        assert made.choices[0].message.content.startswith("我来算。<tool_call>\n")


@pytest.mark.parametrize("written_call", ["add(1)", '["add"]', '{"arguments": {}}', '{"name": "add", "arguments": 3}'])
def test_a_call_that_is_no_json_stays_text_and_is_flagged(ask, written_call):
    script = ("<tool_call>", f"\n{written_call}\n", "</tool_call>", "<_end>")
    made, _ = ask("telechat2", script, tools=TOOLS)
    message = made.choices[0].message
    assert message.content == f"<tool_call>\n{written_call}\n</tool_call>" and message.tool_calls is None
    assert message.model_extra["tool_call_error"] == "a call of a tool was not a JSON object with name and arguments"
    assert made.choices[0].finish_reason == "stop"
    chunks, _ = ask("telechat2", ("<tool_call>", "\n{", "<_end>"), tools=TOOLS, stream=True)
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "<tool_call>\n{"
    assert [delta.model_extra["tool_call_error"] for delta in deltas if "tool_call_error" in (delta.model_extra or {})] == [
        "a call of a tool was begun and not ended"]


THOUGHT = ("先想一想。\n", "</think>", "\n是2。", "<_end>")


def test_thoughts(ask):
    made, engine = ask("telechat3", THOUGHT)
    message = made.choices[0].message
    assert message.content == "是2。" and message.model_extra["reasoning_content"] == "先想一想。"
    assert engine.prompts[0][-3] == 10, "the prompt opens a thought"
    chunks, _ = ask("telechat3", THOUGHT, stream=True)
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join((delta.model_extra or {}).get("reasoning_content") or "" for delta in deltas) == "先想一想。\n"
    assert "".join(delta.content or "" for delta in deltas) == "是2。"


def test_calls_of_the_coder(ask):
    """Its calls are names with parameters; a value is what the tool's definition says."""
    tools = [{"type": "function", "function": {"name": "run", "parameters": {
        "type": "object", "properties": {"code": {"type": "string"}}}}}]
    call = "run<param_key>code</param_key><param_value>1</param_value><param_key>n</param_key><param_value>1</param_value>"
    script = ("\n想\n", "</think>", "看", "<tool_call>", call, "</tool_call>", "<_end>")
    made, engine = ask("coder", script, tools=tools)
    message = made.choices[0].message
    assert message.content == "看" and message.model_extra["reasoning_content"] == "想"
    assert json.loads(message.tool_calls[0].function.arguments) == {"code": "1", "n": 1}
    assert engine.prompts[0][-1] == 10 and made.choices[0].finish_reason == "tool_calls"
    made, engine = ask("coder", ("<tool_call>", "run(1)", "</tool_call>", "<_end>"), tools=tools,
                       extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert made.choices[0].message.content == "<tool_call>run(1)</tool_call>" and engine.prompts[0][-1] == 9
    assert made.choices[0].message.model_extra["tool_call_error"].startswith("a call of a tool was not a name with")


def test_thoughts_switched_off(ask):
    made, engine = ask("telechat3", ("是2。", "<_end>"), extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert made.choices[0].message.content == "是2。" and engine.prompts[0][-3] == 9
    assert "reasoning_content" not in (made.choices[0].message.model_extra or {})


def test_system_text_and_thoughts_of_the_history(ask, tokenizers):
    messages = [{"role": "system", "content": "甲"}, {"role": "user", "content": "一"},
                {"role": "assistant", "content": "二", "reasoning_content": "想"}, {"role": "user", "content": "三"}]
    _, engine = ask("telechat3", THOUGHT, messages=messages)
    tok, chat_format = tokenizers["telechat3"]
    history = [{"role": "system", "content": "甲"}, {"role": "user", "content": "一"}, {"role": "bot", "content": "二"}]
    assert engine.prompts[0] == build_prompt(tok, history, "三", 1 << 20, chat_format)


@pytest.mark.parametrize("name, body, said", [
    ("telechat2", dict(tools=[{"type": "function"}]), r"tools\[0\] must be"),
    ("telechat2", dict(tools=TOOLS, tool_choice="required"), 'tool_choice must be "auto" or "none", not "required"'),
    ("telechat2", dict(messages=[{"role": "critic", "content": "x"}]),
     r'messages\[0\].role must be "system", "user", "assistant" or "tool", not "critic"'),
    ("telechat2", dict(messages=[{"role": "tool", "content": "x"}]), "has a tool's result without a call before it"),
    ("telechat2", dict(extra_body={"chat_template_kwargs": {"enable_thinking": True}}), "this model does not think"),
    ("telechat3", dict(extra_body={"chat_template_kwargs": {"thinking": True}}),
     'chat_template_kwargs must be {"enable_thinking": true or false}'),
    ("telechat3", dict(messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]),
     "the last of messages must be the user's or a tool's"),
])
def test_wrong_requests(ask, name, body, said):
    with pytest.raises(openai.BadRequestError, match=said.replace("{", r"\{")):
        ask(name, ("x", "<_end>"), **body)


def test_answers_taken_apart_token_by_token(tokenizers):
    """The joined pieces are the text; every place may be entered and left at any token."""
    tok, chat_format = tokenizers["telechat3"]
    ids = written(tok, chat_format, "想", "</think>", "\n\n答<think>", "<tool_call>", '{"name": "f"}', "</tool_call>", "尾")
    stream = AnswerStream(tok, chat_format.template, thinking=True)
    text = "".join(map(stream.put, ids)) + stream.end()
    assert (text, stream.take()) == ("答<think>尾", AnswerParts("想", ({"name": "f", "arguments": {}},)))
    assert stream.take() == AnswerParts()
    spelt = "".join(spelt_answer(tok, chat_format.template, ids))
    assert spelt == '<think>\n想</think>\n\n答<think><tool_call>{"name": "f"}</tool_call>尾'
