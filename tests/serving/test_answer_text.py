"""Stop strings in streamed text, over every way of cutting it into tokens."""

import pytest

from telechat.serving.answer_text import AnswerText


def answer(tokenizer, text, stops):
    """What comes of the tokens of ``text``, and after how many of them the answer stopped."""
    made, pieces = AnswerText(tokenizer, stops), []
    for number, token in enumerate(tokenizer.encode(text, control_tokens=False), start=1):
        pieces.append(made.put(token))
        if made.stopped:
            return "".join(pieces) + made.end(), number
    return "".join(pieces) + made.end(), None


@pytest.mark.parametrize("stops, expected", [
    ((), "one, two, three, two"), (("two",), "one, "), (("three", "two, th"), "one, "), (("four",), "one, two, three, two"),
    (("wo, two",), "one, two, three, two"), (("o, two",), "one, two, three, two"), (("e, two",), "on"),
    (("ee, two",), "one, two, thr"), (("one",), ""), ((", two!",), "one, two, three, two"),
])
def test_the_answer_ends_before_the_first_stop_string(tokenizer, stops, expected):
    text, number = answer(tokenizer, "one, two, three, two", stops)
    assert text == expected
    assert (number is None) == (expected == "one, two, three, two")


def test_whole_characters_and_chinese_stops(tokenizer):
    text = "生抽与老抽的区别🙂在颜色"
    assert answer(tokenizer, text, ())[0] == text
    assert answer(tokenizer, text, ("🙂在",))[0] == "生抽与老抽的区别"


def test_nothing_is_held_back_that_cannot_become_a_stop_string(tokenizer):
    made = AnswerText(tokenizer, ("。", "END"))
    for token in tokenizer.encode("生抽E", control_tokens=False):
        last = made.put(token)
    assert last == "" or last.endswith("抽"), "E may be the beginning of END"
    assert made.end() == "E"
