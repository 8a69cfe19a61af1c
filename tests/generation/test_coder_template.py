"""TeleChat3-Coder's format: texts that ms-swift's tests compare with the published template, and its calls of tools."""

import json
import shutil

import pytest

from telechat import Tokenizer
from telechat.data.conversation import ChatFormat, parse_messages
from telechat.data.encoding import IGNORED, encode_conversation
from telechat.generation.chat import build_prompt, parse_prompt

MARKS = ("<param_key>", "</param_key>", "<param_value>", "</param_value>")
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}}]


@pytest.fixture(scope="module", params=["text", "tokens"])
def coder(request, shared, tmp_path_factory):
    """(Tokenizer, ChatFormat), told by a chat template that lies beside it, or by tokens that are registered."""
    folder = tmp_path_factory.mktemp("coder")
    shutil.copy(shared / "data/telechat3_36b.tokenizer.model", folder / "tokenizer.model")
    if request.param == "text":
        (folder / "chat_template.jinja").write_text("{{ '<param_key>' + key }}")
    else:
        tokens = {str(15 + number): {"content": mark} for number, mark in enumerate(MARKS)}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    Tokenizer.from_pretrained(folder).save(folder / "copy")
    tok = Tokenizer.from_pretrained(folder / "copy")
    return tok, ChatFormat.for_tokenizer(tok)


def written(coder, messages, tools=None, **options):
    tok, chat_format = coder
    names = {"<_control1>": MARKS[0], "<_control2>": MARKS[1], "<_control3>": MARKS[2], "<_control4>": MARKS[3]}
    parts = chat_format.template.parts(chat_format, messages, tools, **options)
    spelt = [part.content if isinstance(part.content, str) else tok.id_to_token(part.content) for part in parts]
    return "".join(names.get(text, text) for text in spelt)


def turns(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "bot") * len(texts), texts)]


@pytest.mark.parametrize("texts, expected", [
    (("hi", "answer"), "<_system><_user>hi<_bot></think>answer<_end>"),
    (("hi", "<think>plan</think>answer", "again", "done"),
     "<_system><_user>hi<_bot></think>answer<_end><_user>again<_bot></think>done<_end>"),
    (("question", "<think>\nplan\n</think>\nanswer"),
     "<_system><_user>question<_bot><think>\nplan\n</think>answer<_end>"),
    (("q", "<think>\n\n</think>answer"), "<_system><_user>q<_bot></think>answer<_end>"),
    (("q", "prefix\n<think>x</think>answer"), "<_system><_user>q<_bot><think>\nx\n</think>answer<_end>"),
    (("q",), "<_system><_user>q<_bot><think>"),
])
def test_published_texts(coder, texts, expected):
    assert written(coder, turns(*texts), prompt=len(texts) % 2 == 1) == expected


def test_thoughts_between_calls_stay_and_earlier_ones_go(coder):
    call = {"role": "bot", "content": "<think>\np\n</think>\n", "tool_calls": [
        {"name": "get_weather", "arguments": {"city": "上</think>海", "days": 2}}]}
    first = [{"role": "system", "content": "助手"}, *turns("q1"), call, {"role": "tool", "content": "晴"},
             {"role": "tool", "content": "雨"}]
    said = ("<tool_call>get_weather<param_key>city</param_key><param_value>上</think>海</param_value><param_key>days"
            "</param_key><param_value>2</param_value></tool_call><_end>"
            "<_observation><tool_response>晴</tool_response><tool_response>雨</tool_response><_bot>")
    assert written(coder, first, prompt=True) == f"<_system>助手<_user>q1<_bot><think>\np\n</think>{said}<think>"
    later = [*first, {"role": "bot", "content": "好"}, *turns("q2")]
    assert written(coder, later, prompt=True, thinking=False) == (
        f"<_system>助手<_user>q1<_bot></think>{said}</think>好<_end><_user>q2<_bot></think>")


def test_tools_offered(coder):
    text = written(coder, [{"role": "system", "content": "S"}, *turns("q")], TOOLS, prompt=True)
    assert text == (
        "<_system>S\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
        "function signatures within <tools></tools> XML tags:\n<tools>\n" + json.dumps(TOOLS[0]) + "\n</tools>\n\nFor each "
        "function call, output the function name and arguments within the following XML format:\n<tool_call>{function-name}"
        "<param_key>{param-key-1}</param_key><param_value>{param-value-1}</param_value><param_key>{param-key-2}</param_key>"
        "<param_value>{param-value-2}</param_value>...</tool_call><_user>q<_bot><think>")
    tok, chat_format = coder
    prompt = build_prompt(tok, [], "q", 1 << 20, chat_format, tools=TOOLS)
    assert prompt.count(11) == prompt.count(12) == 1, "the marks of a call are tokens"
    assert prompt.count(15) == (2 if chat_format.template.parameter_tokens else 0)


def test_marks_in_a_message_stay_text(coder):
    tok, chat_format = coder
    prompt = build_prompt(tok, [], "<param_key><tool_call><think>", 1 << 20, chat_format)
    assert [index for index in prompt if index in chat_format.template.marks] == [10]
    assert parse_prompt(tok, "<_user>一<_bot></think>二<_end><_user>三<_bot>", chat_format) == build_prompt(
        tok, turns("一", "二"), "三", 1 << 20, chat_format)


def test_the_answer_and_its_calls_are_learnt(coder):
    tok, chat_format = coder
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": [
        {"function": {"name": "f", "arguments": {"x": "1"}}}]}, {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "b", "reasoning_content": "t"}]}
    ids, labels = encode_conversation(tok, chat_format, parse_messages(record))
    bots = [place for place, index in enumerate(ids) if index == chat_format.bot]
    assert ids[bots[0] + 1] == 9 and labels[bots[0] + 1] == IGNORED, "no thought: its end is the prompt's"
    first = [label for label in labels[:bots[1]] if label != IGNORED]
    assert first[0] == tok.encode("a")[0] and first[-1] == chat_format.end and 11 in first and 12 in first
    assert labels[bots[1] + 1:] == ids[bots[1] + 1:] == [10, *tok.encode("\nt\n"), 9, *tok.encode("b"), chat_format.end]


@pytest.mark.parametrize("text, arguments", [
    ("get_weather<param_key> city </param_key>\n<param_value> 22 </param_value><param_key>days</param_key> <param_value>3"
     "</param_value>", {"city": "22", "days": 3}),
    ("get_weather<param_key>days</param_key><param_value>null</param_value>", {"days": None}),
    ("\nget_weather\n", {}),
    ("other<param_key>city</param_key><param_value>22</param_value><param_key>b</param_key><param_value>x<y"
     "</param_value>", {"city": 22, "b": "x<y"}),
])
def test_calls_are_read(coder, text, arguments):
    name = "other" if "other" in text else "get_weather"
    assert coder[1].template.read_call(text, TOOLS) == {"name": name, "arguments": arguments}


@pytest.mark.parametrize("text", ["", '{"name": "get_weather"}', "get weather", "get_weather(1)", "f<param_key>a</param_key>",
                                  "f<param_key>a</param_key><param_value>1</param_value>rest"])
def test_what_is_no_call(coder, text):
    with pytest.raises(ValueError, match="a call of a tool was not a name with parameters"):
        coder[1].template.read_call(text, TOOLS)
