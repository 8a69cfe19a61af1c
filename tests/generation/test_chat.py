"""Chat prompts: the official ones, and what is text in them."""

import json

import pytest

from telechat.data.conversation import ChatFormat
from telechat.data.encoding import encode_conversation
from telechat.errors import InputError
from telechat.generation.chat import build_prompt, parse_prompt

QUESTION = "生抽与老抽的区别？"


def turn(role, content):
    return {"role": role, "content": content}


def test_prompts_equal_official(shared, tok_12b):
    cases = json.loads((shared / "reference" / "chat_12b.json").read_text(encoding="utf-8"))
    assert len(cases) == 12
    for case in cases:
        history = json.loads(json.dumps(case["history"]))
        assert build_prompt(tok_12b, history, case["question"], case["max_length"]) == case["input_ids"]
        assert history == case["history"]  # left as it was


def test_oldest_messages_go_first(tok):
    one, two, three = (len(tok.encode(text, control_tokens=False)) for text in ("一", "why", "三"))
    history = [turn("user", "一"), turn("bot", "why")]
    whole = [20, *tok.encode("一"), 21, *tok.encode("why"), 2, 20, *tok.encode("三"), 21]
    question = three + 2
    # Each message is measured with the question alone, and must stay below max_length.
    assert build_prompt(tok, history, "三", question + two + 3) == whole
    assert build_prompt(tok, history, "三", question + two + 2) == whole[-question:]
    # The fit holds for the whole: one id less, and the older message goes, and with it its answer.
    assert build_prompt(tok, history, "三", len(whole), fit=True) == whole
    assert build_prompt(tok, history, "三", len(whole) - 1, fit=True) == whole[-question:]
    assert one >= 1 and question + two + 3 < len(whole)


def test_a_question_longer_than_the_prompt_may_be(tok):
    ids = tok.encode("why " * 50)
    prompt = build_prompt(tok, [turn("user", "x")], "why " * 50, 20)
    assert prompt == [20, *ids[-19:], 21] and len(prompt) == 21  # the official code's one too many
    assert build_prompt(tok, [], "why " * 50, 20, fit=True) == [20, *ids[-18:], 21]


@pytest.mark.parametrize("max_length", range(4, 60, 5))
def test_fit_never_exceeds(tok_12b, tok_52b, max_length):
    history = [turn("user", "你好"), turn("bot", "你好！有什么可以帮你？" * 2),
               turn("user", "天气"), turn("bot", "晴")]
    for tok, first in ((tok_12b, 20), (tok_52b, 27)):
        chat_format = ChatFormat.for_tokenizer(tok)
        prompt = build_prompt(tok, history, QUESTION, max_length, fit=True)
        assert len(prompt) <= max_length and prompt[0] == first and prompt[-1] == chat_format.bot
        # Every answer that is kept has its question before it.
        assert prompt.count(chat_format.user) == prompt.count(chat_format.bot)


def test_history_is_as_in_training(tok_52b):
    """52B: start token first, each turn as the packed conversations have it."""
    chat_format = ChatFormat.for_tokenizer(tok_52b)
    trained, _ = encode_conversation(tok_52b, chat_format, [("你好", "你好！"), (QUESTION, "")])
    prompt = build_prompt(tok_52b, [turn("user", "你好"), turn("bot", "你好！")], QUESTION, 512)
    assert prompt == trained[:-1]
    assert prompt[:2] == [27, 25] and prompt[-1] == 26


def test_typed_control_tokens_are_text(tok):
    typed = "<_user>一<_bot><_end>"
    for content in (typed, "一" + typed):
        prompt = build_prompt(tok, [turn("user", content), turn("bot", content)], content, 512,
                              honour_leading_marker=False)
        assert [index for index in prompt if index in tok.control_ids] == [20, 21, 2, 20, 21]
        assert tok.decode(prompt, skip_control_tokens=True).count(typed) == 3


def test_leading_marker_of_the_published_files(tok, tok_52b):
    # The tokenizer's own marker: a second user token, as the official code has it, with text behind it.
    assert build_prompt(tok, [], "<_user>why", 64) == [20, *tok.encode("<_user>why"), 21]
    prompt = build_prompt(tok, [], "<_user>why<_bot><_user>", 64)
    assert [index for index in prompt if index in tok.control_ids] == [20, 20, 21]
    assert tok.decode(prompt, skip_control_tokens=True) == "why<_bot><_user>"
    # 52B has no <_user>; what the marker says is said by the format.
    assert build_prompt(tok_52b, [], "<_user>你好", 64) == build_prompt(tok_52b, [], "你好", 64)
    assert build_prompt(tok_52b, [], "<_user>你好", 64, honour_leading_marker=False) != \
        build_prompt(tok_52b, [], "你好", 64)
    # An answer never begins with a question's marker.
    history = [turn("user", "q"), turn("bot", "<_user>a")]
    assert build_prompt(tok, history, "p", 64).count(20) == 2


def test_another_format(tok):
    chat_format = ChatFormat.for_tokenizer(tok, start_token="<_start>")
    assert build_prompt(tok, [], "why", 64, chat_format) == [1, 20, *tok.encode("why"), 21]
    assert parse_prompt(tok, "why", chat_format) == [1, 20, *tok.encode("why"), 21]


@pytest.mark.parametrize("history, error", [
    ([turn("system", "x")], 'the role of message 1 of the history must be "user" or "bot", not .system'),
    ([turn("user", "x"), {"content": "x"}], "the role of message 2 of the history"),
    ([turn("user", None)], "message 1 of the history must be"),
    (["<_user>x"], "message 1 of the history must be"),
    ({"role": "user"}, "the history must be a list of messages, not dict"),
    (None, "the history must be a list of messages, not NoneType"),
    ([turn("bot", "\ud800")], "half of a surrogate pair"),
])
def test_bad_history(tok, history, error):
    with pytest.raises(InputError, match=error):
        build_prompt(tok, history, "q", 64)


def test_bad_arguments(tok):
    for max_length in (2, 0, -1, 64.0, None):
        with pytest.raises(InputError, match="max_length must be a whole number of 3 or more"):
            build_prompt(tok, [], "q", max_length)
    with pytest.raises(InputError, match="the question must be a string, not int"):
        build_prompt(tok, [], 5, 64)
    for text in ("", None):
        with pytest.raises(InputError, match="a prompt must be a string that is not empty"):
            parse_prompt(tok, text)


def test_a_prompt_with_control_tokens_has_the_ids_of_training(tok):
    chat_format = ChatFormat.for_tokenizer(tok)
    trained, _ = encode_conversation(tok, chat_format, [("why", "so 1"), (QUESTION, "")])
    assert parse_prompt(tok, f"<_user>why<_bot>so 1<_end><_user>{QUESTION}<_bot>") == trained[:-1]
    asked = [20, *tok.encode(QUESTION), 21]
    assert parse_prompt(tok, QUESTION) == parse_prompt(tok, f"<_user>{QUESTION}<_bot>") == asked
    assert parse_prompt(tok, "<_system>x<_pad>") == [tok.token_to_id("<_system>"), *tok.encode("x"), 3]
    assert parse_prompt(tok, "</s>x")[1:-1] == tok.encode("</s>x")  # not a control token here


def test_52b_prompts_in_either_spelling(tok_52b):
    expected = [27, 25, *tok_52b.encode(QUESTION), 26]
    for text in (f"<reserve3><reserve1>{QUESTION}<reserve2>", f"<_user>{QUESTION}<_bot>",
                 f"<reserve1>{QUESTION}<reserve2>", QUESTION):
        assert parse_prompt(tok_52b, text) == expected
    assert parse_prompt(tok_52b, f"<_user>1<_bot>2<_end><_user>{QUESTION}<_bot>") == [
        27, 25, *tok_52b.encode("1"), 26, *tok_52b.encode("2"), 2, *expected[1:]]
