"""Records in the forms of Alpaca, ShareGPT and OpenAI: every field becomes part of a turn, or is refused by name."""

import gzip
import json

import pytest

from telechat.data.conversation import parse_conversation, parse_messages, read_conversations, read_prompts
from telechat.errors import InputError


def says(*pairs, who="role", what="content"):
    return [{who: role, what: text} for role, text in pairs]


SHARED = says(("human", "q"), ("gpt", "a"), ("human", "p"), ("gpt", "b"), who="from", what="value")
OPENAI = says(("user", "q"), ("assistant", "a"), ("user", "p"), ("assistant", "b"))


@pytest.mark.parametrize("record, turns", [
    ({"instruction": "i", "input": "", "output": "a"}, [("i", "a")]),
    ({"instruction": "i", "output": "a"}, [("i", "a")]),
    ({"instruction": "i", "input": None, "output": "a", "history": None, "system": ""}, [("i", "a")]),
    ({"instruction": "i", "input": "x", "output": "a"}, [("i\nx", "a")]),
    ({"instruction": "", "input": "x", "output": "a", "history": []}, [("x", "a")]),
    ({"instruction": "i", "input": "x", "output": "a", "history": [["q", "b"], ["p", "c"]]},
     [("q", "b"), ("p", "c"), ("i\nx", "a")]),
    ({"instruction": "<_user>i<_bot>", "output": "a<_end>"}, [("<_user>i<_bot>", "a<_end>")]),  # text is text there
    ({"input": "q<_bot>b<_user>p", "output": "a", "history": [["o", "c"]]}, [("o", "c"), ("q", "b"), ("p", "a")]),
    ({"conversations": SHARED, "id": "x_0"}, [("q", "a"), ("p", "b")]),
    ({"conversations": OPENAI}, [("q", "a"), ("p", "b")]),
    ({"messages": OPENAI, "tools": None}, [("q", "a"), ("p", "b")]),
    ({"messages": SHARED, "source": "s"}, [("q", "a"), ("p", "b")]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "p"}]},
                   {"role": "assistant", "content": "a", "tool_calls": [], "refusal": None}]}, [("qp", "a")]),
    ({"messages": says(("user", "q"), ("user", "p"), ("assistant", "a"), ("assistant", "b"))}, [("q\np", "a\nb")]),
    ({"system": "", "dialog": says(("user", "q"), ("bot", "a<_end>")), "multiturn": False, "tool": True, "id": 3},
     [("q", "a<_end>")]),
])
def test_forms(record, turns):
    assert parse_conversation(record) == turns


@pytest.mark.parametrize("record, question", [
    ({"instruction": "i", "input": "x", "output": "a", "system": "s"}, "s\ni\nx"),
    ({"instruction": "i", "output": "a", "system": "s", "history": [["q", "b"]]}, "s\nq"),
    ({"input": "q", "output": "a", "system": "s"}, "s\nq"),
    ({"conversations": SHARED, "system": "s"}, "s\nq"),
    ({"messages": says(("system", "s"), ("system", "t")) + OPENAI}, "s\nt\nq"),
    ({"messages": says(("system", "t")) + OPENAI, "system": "s"}, "s\nt\nq"),
    ({"system": "s\n", "dialog": OPENAI, "multiturn": True, "tool": False}, "s\nq"),
])
def test_a_system_text_is_refused_or_put_in_front_of_the_first_question(record, question):
    with pytest.raises(InputError, match="^has a system text, and TeleChat was not trained with one; put it into the "
                                         "question, or give --system prepend, which puts it in front of the first"):
        parse_conversation(record)
    turns = parse_conversation(record, system="prepend")
    assert turns[0][0] == question and "s" not in "".join(text for turn in turns[1:] for text in turn)


def test_an_empty_system_text_is_none():
    record = {"messages": says(("system", "")) + OPENAI}
    assert parse_conversation(record) == parse_conversation(record, system="prepend") == [("q", "a"), ("p", "b")]


UNKNOWN = "has the field \"{}\", which is not understood here; remove it, or put what it says into the question"


@pytest.mark.parametrize("record, error", [
    *[({**record, name: "x"}, UNKNOWN.format(name)) for name in ("context", "prompt", "tools")
      for record in ({"input": "q", "output": "a"}, {"instruction": "q", "output": "a"}, {"messages": OPENAI},
                     {"conversations": SHARED})],
    ({"messages": OPENAI, "input": "q"}, UNKNOWN.format("input")),
    ({"messages": OPENAI, "multiturn": True}, UNKNOWN.format("multiturn")),
    ({"dialog": OPENAI, "prompt": "q"}, UNKNOWN.format("prompt")),
    ({"messages": OPENAI, "conversations": SHARED}, UNKNOWN.format("conversations")),
    ({"input": "q", "output": "a", "instructions": "i"}, UNKNOWN.format("instructions")),
    ({"prompt": "q", "completion": "a"}, 'lacks the field "input"'),
    ({"instruction": "i"}, 'lacks the field "output"'),
    ({"instruction": 3, "output": "a"}, '"instruction" must be a string, not a number'),
    ({"instruction": "i", "output": "a", "system": ["s"]}, '"system" must be a string, not an array'),
    *[({"instruction": "i", "output": "a", "history": history}, '"history" must be a list of [question, answer]')
      for history in ("q", {"q": "a"}, ["q", "a"], [["q"]], [["q", "a", "p"]])],
    ({"instruction": "i", "output": "a", "history": [["q", None]]},
     'turn 1 of history: "answer" must be a string, not null'),
    ({"messages": "q"}, '"messages" must be a list with at least a question and an answer, not a string'),
    ({"messages": []}, '"messages" is empty'),
    ({"messages": [3]}, "messages[0] must be an object, not a number"),
    ({"messages": [{"content": "q"}]}, 'messages[0]: lacks the field "role"'),
    ({"conversations": [{"from": "human"}]}, 'conversations[0]: lacks the field "value"'),
    ({"conversations": says(("human", "q"), ("tool", "a"), who="from", what="value")},
     "conversations[1]: from must be one of user, human, assistant, gpt, bot, chatgpt, system, developer, not \"tool\""),
    ({"messages": [{"role": "user", "content": "q", "name": "n"}]}, 'messages[0] has the field "name", which is not'),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]},
     'messages[0].content must be a text, or a list of {"type": "text", "text": …}'),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [{"a": 1}]}]},
     'messages[1] has the field "tool_calls", which is not understood here'),
    ({"messages": OPENAI[:3]}, "ends with a question; it must end with the answer to learn"),
    ({"messages": OPENAI[1:]}, "an answer has no question before it; a conversation begins with the user's question"),
    ({"messages": OPENAI + says(("system", "s")) + OPENAI}, "has a system text"),
])
def test_what_is_not_understood_is_refused_by_name(record, error):
    with pytest.raises(InputError) as refused:
        parse_conversation(record)
    assert str(refused.value).startswith(error)


def test_a_system_text_must_come_first():
    with pytest.raises(InputError, match="^has a system text behind a question; it must come first$"):
        parse_conversation({"messages": OPENAI + says(("system", "s")) + OPENAI}, system="prepend")


def test_one_array_over_many_lines(tmp_path):
    path = tmp_path / "alpaca.json"
    records = [{"instruction": "一", "input": "", "output": "1"}, {"conversations": SHARED}]
    path.write_bytes(b"\xef\xbb\xbf\n" + json.dumps(records, ensure_ascii=False, indent=2).encode())
    assert read_conversations(path) == [[("一", "1")], [("q", "a"), ("p", "b")]]
    path.write_text(json.dumps([*records, {"instruction": "x"}], indent=1))
    with pytest.raises(InputError, match='alpaca.json, record 3: lacks the field "output"$'):
        read_conversations(path)
    path.write_text(json.dumps(records, indent=1)[:-9])
    with pytest.raises(InputError, match="alpaca.json is not valid JSON .Expecting"):
        read_conversations(path)


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf\n{L}\n{L}", b"\n \r\n{L}\r\n\xef\xbb\xbf{L}\r\n", b"{L}\n\xef\xbb\xbf\n{L}"])
def test_blank_lines_and_byte_order_marks_anywhere(tmp_path, content):
    (tmp_path / "x.jsonl").write_bytes(content.replace(b"{L}", '{"input": "问", "output": "答"}'.encode()))
    assert read_conversations(tmp_path / "x.jsonl") == [[("问", "答")]] * 2


def test_other_encodings_and_files_that_are_no_data(tmp_path):
    path = tmp_path / "x.jsonl"
    for content, error in [('{"input": "q"}'.encode("utf-16"), "is not UTF-8 but UTF-16; save the file as UTF-8"),
                           ('{"input": "问"}'.encode("gbk"), "line 1: is not UTF-8; save the file as UTF-8"),
                           (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "is a Git LFS pointer"),
                           (b"<!DOCTYPE html>\n<html>", "is a web page and not the file itself"),
                           (gzip.compress(b'{"input": "q"}'), "is packed with gzip; unpack it, and give the JSONL file in it"),
                           (b"PAR1\x15\x04", "is a Parquet file; save its records as JSONL, an object a line"),
                           (json.dumps({"input": "q"}, indent=2).encode(), "spreads a JSON object over several lines; write")]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=error):
            read_prompts(path)


def test_prompts_are_refused_where_a_part_would_be_lost(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"input": "q", "output": "a"}\n{"input": "q", "instruction": "i"}')
    with pytest.raises(InputError, match='line 2: has the field "instruction", which is not understood here'):
        read_prompts(path)


@pytest.mark.parametrize("roles", [("user", "system", "assistant"), ("system", "user", "system", "assistant"),
                                   ("system", "user", "assistant", "user", "system", "assistant")])
def test_a_system_text_behind_a_question_is_refused(roles):
    with pytest.raises(InputError, match="^has a system text behind a question; it must come first$"):
        parse_conversation({"messages": [{"role": role, "content": "x"} for role in roles]}, system="prepend")


@pytest.mark.parametrize("record", [
    {"input": "<_user>一<_bot>二<_end><_user>三", "output": "四"},
    {"input": "三", "output": "四", "history": [["一", "二"]]},
    {"instruction": "三", "output": "四", "history": [["一", "二"]]},
    {"messages": [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "一二三四")]},
    {"conversations": [{"from": who, "value": text} for who, text in zip(("human", "gpt") * 2, "一二三四")]},
])
def test_every_form_is_read_for_a_format_with_a_template_too(record):
    conversation = parse_messages(record)
    assert [(message["role"], message["content"]) for message in conversation.messages] == list(
        zip(("user", "bot") * 2, "一二三四"))
    assert conversation.tools is None and parse_conversation(record) == [("一", "二"), ("三", "四")]
