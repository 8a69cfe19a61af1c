"""Stop strings in streamed text, over every way of cutting it into tokens."""

import pytest

from telechat.generation.sampling import TokenLogprobs
from telechat.serving.answer_text import AnswerText
from telechat.serving.logprobs import TokenText


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


def chances(tokenizer, text, stops=()):
    """Each token's text and offset, as they come and at the end."""
    made, taken, whole = AnswerText(tokenizer, stops), [], ""
    for token in tokenizer.encode(text, control_tokens=False):
        whole += made.put(token, TokenLogprobs(token, -1.0, [(token, -1.0)]))
        taken.append([(chance.token, chance.offset) for chance in made.take_chances()])
        if made.stopped:
            break
    whole += made.end()
    taken.append([(chance.token, chance.offset) for chance in made.take_chances(True)])
    return whole, taken


def test_log_probabilities_come_with_their_text(tokenizer):
    text = "one two 🙂 抽"
    whole, taken = chances(tokenizer, text)
    tokens = [token for part in taken for token, _ in part]
    assert whole == text and b"".join(token.data for token in tokens).decode() == text
    assert len(tokens) == len(tokenizer.encode(text, control_tokens=False))
    halves = [token.text for token in tokens if token.text.startswith("bytes:")]
    assert halves == [f"bytes:\\x{byte:02x}" for byte in "🙂".encode()], "the tokenizer has no piece for it"
    for token, offset in (pair for part in taken for pair in part):
        assert token.text.startswith("bytes:") or whole[offset:].startswith(token.text)


def test_log_probabilities_of_a_stop_string_never_come(tokenizer):
    text = "one, two, three"
    for stop in (" two", " two, th"):
        whole, taken = chances(tokenizer, text, (stop,))
        assert whole == "one,"
        assert b"".join(token.data for part in taken for token, _ in part).decode() == "one," and taken[-1] == []


def test_control_tokens_have_no_bytes(tokenizer):
    token = TokenText.of(tokenizer, 2, first=False)
    assert (token.text, token.data) == ("<_end>", None)
