"""Streaming gives the same text as decoding everything at the end, and never half a character."""

import random

import pytest

from telechat.data.text_stream import TextStream
from telechat.errors import InputError

TOKENIZERS = ["tok", "reserved_tok", "byte_level_tok", "tok_12b", "tok_52b"]


def stream(tok, ids, skip):
    text_stream = TextStream(tok, skip)
    return [*map(text_stream.put, ids), text_stream.end()]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("which", TOKENIZERS)
def test_text_comes_in_whole_characters(which, skip, request):
    tok = request.getfixturevalue(which)
    text = " Hello 😀👍🏽, 𠮷野家 生抽é𓀀 01\n  end "
    ids = tok.encode(text)
    pieces = stream(tok, ids, skip)
    assert "".join(pieces) == text
    # Some characters are several tokens, and the text does not come all at the end.
    assert len(ids) > len([piece for piece in pieces if piece]) > 5
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("which", TOKENIZERS)
def test_any_ids_stream_to_their_decoding(which, request):
    """Random ids, among them many single bytes, broken characters, spaces and control tokens."""
    tok = request.getfixturevalue(which)
    control = sorted(tok.control_ids)[:12]
    low = [index for index in range(min(tok.vocab_size, 450)) if index not in tok.control_ids]
    spaces = [index for index in map(tok.token_to_id, ("▁", "▁▁", "Ġ")) if index is not None]
    rng = random.Random(0)
    broken = 0
    for _ in range(1500):
        ids = [rng.choice(rng.choice((control, low, low, spaces))) for _ in range(rng.randrange(10))]
        for skip in (True, False):
            text = tok.decode(ids, skip)
            assert "".join(stream(tok, ids, skip)) == text, ids
            broken += "\ufffd" in text
    assert broken > 100


@pytest.mark.parametrize("which", ["tok", "byte_level_tok"])
def test_half_a_character_is_held_back_until_the_end(which, request):
    tok = request.getfixturevalue(which)
    ids = tok.encode("x😎")[:-1]
    pieces = stream(tok, ids, True)
    assert "".join(pieces[:-1]) == "x"
    assert pieces[-1] and set(pieces[-1]) == {"\ufffd"}
    assert "".join(pieces) == tok.decode(ids)


def test_a_long_answer_is_not_decoded_again(tok, monkeypatch):
    decoded = []
    decode = tok._model.decode
    monkeypatch.setattr(tok._model, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    ids = tok.encode("生抽颜色浅、味道咸鲜 😀 ") * 50
    text_stream = TextStream(tok)
    for index in ids:
        text_stream.put(index)
    assert sum(decoded) < 5


def test_ids_out_of_range(tok):
    with pytest.raises(InputError, match="token id -1 is not in the vocabulary"):
        TextStream(tok).put(-1)
