"""Parsing of fine-tuning records, their encoding, and what is said about bad ones."""

import json

import pytest

from telechat.data.conversation import ChatFormat, parse_conversation, read_conversations, read_prompts
from telechat.data.encoding import encode_conversation
from telechat.errors import InputError


@pytest.mark.parametrize("text, output, turns", [
    ("<_user>q", "a", [("q", "a")]),
    ("q", "a", [("q", "a")]),
    ("<_user>q<_bot>", "a", [("q", "a")]),
    ("<_user>q<_bot>a<_user>p", "b", [("q", "a"), ("p", "b")]),
    ("q<_bot>a<_user>p", "b", [("q", "a"), ("p", "b")]),
    ("<_user> q\n<_bot> a <_user>p", " b", [(" q\n", " a "), ("p", " b")]),
    ("<_user>q<_bot>a<_end><_user>p", "b<_end>", [("q", "a"), ("p", "b")]),
    ("<_user>q<_bot>a <_end> z<_user>p", "x<_user>y<_bot>", [("q", "a <_end> z"), ("p", "x<_user>y<_bot>")]),
    ("", "", [("", "")]),
    # Messages of one role in a row are one; blanks in front of the first marker are none.
    ("<_user>q<_user>p", "a", [("q\np", "a")]),
    ("<_user>q<_user><_user>p<_bot>a<_end><_bot>b<_user>r", "c", [("q\np", "a\nb"), ("r", "c")]),
    (" \n<_user>q", "a", [("q", "a")]),
])
def test_parsing(text, output, turns):
    assert parse_conversation({"input": text, "output": output}) == turns


def test_parsing_by_the_spelling_of_the_formats_own_tokens():
    record = {"input": "<reserve1>q<reserve2>a<_user>p", "output": "b"}
    assert parse_conversation(record, ("<reserve1>", "<reserve2>")) == [("q", "a"), ("p", "b")]
    assert parse_conversation({"input": "<reserve1>q", "output": "b"}) == [("<reserve1>q", "b")]


@pytest.mark.parametrize("text, error", [
    ("<_user>q<_bot>a", "an answer has no question before it"),
    ("<_bot>a<_user>q", "an answer has no question before it"),
    ("<_bot>", "an answer has no question before it"),
])
def test_turns_out_of_order(text, error):
    with pytest.raises(InputError, match=error):
        parse_conversation({"input": text, "output": "x"})


def test_default_formats(tok, reserved_tok, byte_level_tok):
    assert ChatFormat.for_tokenizer(tok) == ChatFormat(user=20, bot=21, end=2, pad=3, start=None)
    ids = {token: reserved_tok.token_to_id(token) for token in ("<reserve1>", "<reserve2>", "<reserve3>")}
    assert ChatFormat.for_tokenizer(reserved_tok) == ChatFormat(
        user=ids["<reserve1>"], bot=ids["<reserve2>"], end=2, pad=3, start=ids["<reserve3>"])
    # 7B's pad token is <pad>.
    assert ChatFormat.for_tokenizer(byte_level_tok) == ChatFormat(
        user=320, bot=321, end=323, pad=3, start=None)


def test_default_formats_of_the_published_tokenizers(tok_12b, tok_52b):
    assert ChatFormat.for_tokenizer(tok_12b) == ChatFormat(user=20, bot=21, end=2, pad=3, start=None)
    assert ChatFormat.for_tokenizer(tok_52b) == ChatFormat(user=25, bot=26, end=2, pad=3, start=27)


def test_named_tokens(tok, reserved_tok):
    assert ChatFormat.for_tokenizer(tok, start_token="<_start>").start == 1
    assert ChatFormat.for_tokenizer(tok, pad_token="<_unk>").pad == 0
    assert ChatFormat.for_tokenizer(reserved_tok, start_token="").start is None
    assert (ChatFormat.for_tokenizer(reserved_tok, end_token="<reserve4>").end
            == reserved_tok.token_to_id("<reserve4>"))
    for role in ("start", "user", "bot", "end", "pad"):
        with pytest.raises(InputError, match=f"--{role}_token <_nope>: .*tokenizer.model has no such token"):
            ChatFormat.for_tokenizer(tok, **{f"{role}_token": "<_nope>"})
    with pytest.raises(InputError, match="three different tokens"):
        ChatFormat.for_tokenizer(tok, bot_token="<_user>")


def test_encoding_and_labels(tok):
    turns = [("月亮", "不会。"), ("why", "so 1")]
    moon, no, why, so = (tok.encode(text) for text in ("月亮", "不会。", "why", "so 1"))
    input_ids, labels = encode_conversation(tok, ChatFormat.for_tokenizer(tok), turns)
    assert input_ids == [20, *moon, 21, *no, 2, 20, *why, 21, *so, 2]
    assert labels == [*[-100] * (len(moon) + 2), *no, 2, *[-100] * (len(why) + 2), *so, 2]


def test_the_start_token_goes_before_the_conversation(reserved_tok):
    user, bot, start = (reserved_tok.token_to_id(f"<reserve{n}>") for n in (1, 2, 3))
    sky, sea = reserved_tok.encode("sky"), reserved_tok.encode("sea")
    chat_format = ChatFormat.for_tokenizer(reserved_tok)
    input_ids, labels = encode_conversation(reserved_tok, chat_format, [("sky", "sea")])
    assert input_ids == [start, user, *sky, bot, *sea, 2]
    assert labels == [-100, -100, *[-100] * len(sky), -100, *sea, 2]


def test_control_tokens_inside_a_text_are_text(tok):
    turns = [("a <_end> b", "<_bot><_user>")]
    input_ids, labels = encode_conversation(tok, ChatFormat.for_tokenizer(tok), turns)
    assert [index for index in input_ids if index in tok.control_ids] == [20, 21, 2]
    assert labels.count(2) == 1


def test_files_are_read_in_order(tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_bytes('\ufeff{"input": "一", "output": "1"}\r\n\n  \n'
                     '{"output": "2", "input": "二", "id": [0], "x": null}'.encode())
    assert read_conversations(path) == [[("一", "1")], [("二", "2")]]
    assert read_prompts(path) == ["一", "二"]


def test_published_files(shared):
    multi = read_conversations(shared / "data" / "multi_turn_example.jsonl")
    assert len(multi) == 1000 and sum(map(len, multi)) == 2788
    single = read_conversations(shared / "data" / "single_turn_example.jsonl")
    assert len(single) == 1000 and all(len(turns) == 1 for turns in single)
    with open(shared / "data" / "test.jsonl", encoding="utf-8") as file:
        assert read_prompts(shared / "data" / "test.jsonl") == [json.loads(line)["input"] for line in file]


GOOD = '{"input": "q", "output": "a"}\n'


@pytest.mark.parametrize("line, error", [
    ("{'input': 1}", "line 3: is not valid JSON"),
    ('{"input": "q", "output": "a"', "line 3: is not valid JSON"),
    ("[" * 100_000, "line 3: is not valid JSON .nested too deeply"),
    ('["q", "a"]', 'line 3: must be a JSON object with the field "input", not an array'),
    ('"q"', "line 3: must be a JSON object with the field .input., not a string"),
    ("3.5", "line 3: must be a JSON object with the field .input., not a number"),
    ('{"output": "a"}', 'line 3: lacks the field "input"'),
    ('{"input": "q"}', 'line 3: lacks the field "output"'),
    ('{"input": ["q"], "output": "a"}', 'line 3: "input" must be a string, not an array'),
    ('{"input": "q", "output": null}', 'line 3: "output" must be a string, not null'),
    ('{"input": "q", "output": true}', 'line 3: "output" must be a string, not true or false'),
    ('{"input": "q", "output": "\\ud800"}', 'line 3: "output" holds half of a surrogate pair'),
    ('{"input": "q<_bot>p", "output": "a"}', 'line 3: an answer has no question before it; "input" must end with'),
    ('{"input": "q", "output": "a", "input": "p"}', 'line 3: gives the field "input" twice; keep one'),
    ('{"input": "q", "output": ' + "7" * 5000 + "}", "line 3: holds a number of thousands of digits; shorten it"),
    (b"\xff\xfe{}", "line 3: is not UTF-8"),
])
def test_bad_lines_are_named(tmp_path, line, error):
    path = tmp_path / "bad.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode())
    with pytest.raises(InputError, match=error) as caught:
        read_conversations(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")


def test_files_without_content(tmp_path):
    for content in ("", "\n \n"):
        (tmp_path / "empty.jsonl").write_text(content)
        with pytest.raises(InputError, match="empty.jsonl holds no line of JSON"):
            read_conversations(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match="none.jsonl cannot be read .No such file or directory"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="cannot be read .Is a directory"):
        read_prompts(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"input": "q"}\n{"text": "q"}')
    with pytest.raises(InputError, match='p.jsonl, line 2: lacks the field "input"'):
        read_prompts(tmp_path / "p.jsonl")
