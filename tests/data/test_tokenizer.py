"""Tokenizer against the official ids, SentencePiece and the tokenizers library."""

import json
import shutil
import re

import numpy as np
import pytest
import sentencepiece
import tokenizers

from telechat.data.tokenizer import Tokenizer
from telechat.errors import InputError


@pytest.fixture(scope="module", params=["12b", "52b"])
def official(request, shared):
    """(Tokenizer, SentencePiece's own processor, the golden file) of one published model."""
    path = shared / "data" / f"telechat_{request.param}.tokenizer.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    golden = shared / "reference" / f"tokenizer_{request.param}.json"
    return Tokenizer.from_pretrained(path), processor, json.loads(golden.read_text(encoding="utf-8"))


def test_encode_equals_official(official):
    tok, _, golden = official
    assert len(golden["cases"]) == 260
    for case in golden["cases"]:
        assert tok.encode(case["text"]) == case["ids"], case["text"]


@pytest.mark.parametrize("name, published, config", [("telechat2", "telechat2_115b", True),
                                                     ("telechat3", "telechat3_36b", False)])
def test_telechat2_and_3_encode_as_official(shared, tmp_path, name, published, config):
    """TeleChat2's tokenizer_config registers three control pieces alone: a text is not cut at the others."""
    shutil.copy(shared / f"data/{published}.tokenizer.model", tmp_path / "tokenizer.model")
    if config:
        shutil.copy(shared / f"data/{published}.tokenizer_config.json", tmp_path / "tokenizer_config.json")
    tok = Tokenizer.from_pretrained(tmp_path)
    cases = json.loads((shared / f"reference/tokenizer_{name}.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) == 200
    for case in cases:
        assert tok.encode(case["text"]) == case["ids"], case["text"]
        # The official decoding of 2 puts a space in front of a text that a control token follows.
        assert tok.decode(case["ids"]).lstrip(" ") == case["decoded"].lstrip(" ")


def test_decode_equals_sentencepiece(official):
    tok, processor, golden = official
    control = ("<_start>", "<_end>", "<_pad>", "<s>", "</s>", "<pad>", "<unk>")
    split = {tok.token_to_id(token) for token in control}
    for case in golden["cases"]:
        ids = case["ids"]
        if not split & set(ids):
            assert tok.decode(ids) == processor.decode(ids) == case["decoded"]
        kept = [index for index in ids if index not in tok.control_ids]
        assert tok.decode(ids, skip_control_tokens=True) == processor.decode(kept)


def test_encoding_with_control_tokens_decodes_to_the_same_text(official):
    tok, _, golden = official
    for case in golden["cases"]:
        assert tok.decode(case["ids"]) == case["text"]


def test_lookup_of_control_tokens(official):
    tok, _, golden = official
    assert tok.vocab_size == golden["vocab_size"]
    for token, index in golden["special_token_ids"].items():
        # The official code answers unknown, 0, for what the vocabulary lacks.
        expected = None if index == 0 and token not in ("<unk>", "<_unk>") else index
        if token == "<unk>" and tok.token_to_id("<_unk>") == 0:
            expected = None
        assert tok.token_to_id(token) == expected
        if expected is not None:
            assert tok.id_to_token(expected) == token
            assert expected in tok.control_ids


@pytest.mark.parametrize("text, parts", [
    ("a <_end> b", ["a ", 2, " b"]),
    ("<_end>", [2]),
    ("<_end> b", [2, " b"]),
    ("a<_end> b", ["a<_end>", " b"]),  # glued to what stands before it
    ("a <_end>b", ["a ", "<_end>b"]),  # glued to what stands behind it
    ("a\n<_end>", ["a\n<_end>"]),  # only a space is a space
    ("<_end><_pad>", ["<_end><_pad>"]),
    ("a<_end><_end>", ["a<_end>", 2]),  # the first is part of the word now, and the second has no neighbour
    ("a<_start>b", ["a", 1, "b"]),  # this one need not be a single word
])
def test_12b_cuts_where_transformers_does(tok, text, parts):
    """12B's tokenizer_config.json calls <_end> and <_pad> single_word; the rule is transformers'."""
    processor = sentencepiece.SentencePieceProcessor(model_file=tok.path)
    expected = []
    for part in parts:
        expected += [part] if isinstance(part, int) else processor.encode(part)
    assert tok.encode(text) == expected


USER = 20  # of the demo's tokenizer


@pytest.mark.parametrize("config, text, parts", [
    ({"eos_token": "<_end>"}, "a<_end>b", ["a", 2, "b"]),  # a text says nothing of single words
    ({"eos_token": {"content": "<_end>", "single_word": True}}, "a<_end>", ["a<_end>"]),
    ({"eos_token": {"content": "<_end>", "single_word": True}, "unk_token": "<_end>"}, "a<_end>", ["a<_end>"]),
    ({"unk_token": {"content": "<_end>", "single_word": True}, "eos_token": "<_end>"}, "a<_end>b", ["a", 2, "b"]),
    ({"added_tokens_decoder": {"2": {"content": "<_end>", "single_word": True}}, "eos_token": "<_end>"}, "a<_end>", ["a<_end>"]),
    ({"eos_token": {"content": "<_end>", "rstrip": True, "lstrip": True}}, "a \n<_end> \tb", ["a", 2, "b"]),
    ({"eos_token": {"content": "<_end>", "rstrip": True}}, "a <_end> <_start>", ["a ", 2, 1]),
    ({"additional_special_tokens": ["<_end>", 3, None]}, "<_pad>a<_end>", ["<_pad>a", 2]),
    ({"additional_special_tokens": ["<_user>"], "eos_token": "<_end>"}, "a<_user>b", ["a", USER, "b"]),  # user-defined
])
def test_a_tokenizer_config_says_how_a_text_is_cut(tok, tmp_path, config, text, parts):
    """transformers' rules: what is found first in added_tokens_decoder, then bos, eos, unk, … counts."""
    shutil.copy(tok.path, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    processor = sentencepiece.SentencePieceProcessor(model_file=tok.path)
    expected = []
    for part in parts:
        expected += [part] if isinstance(part, int) else processor.encode(part)
    assert Tokenizer.from_pretrained(tmp_path).encode(text) == expected


def test_52b_cuts_at_its_special_tokens(reserved_tok):
    processor = sentencepiece.SentencePieceProcessor(model_file=reserved_tok.path)
    assert reserved_tok.encode("sky</s><unk>sea<_end>x<pad>") == [
        *processor.encode("sky"), 2, 0, *processor.encode("sea<_end>x"), 3]


CONTROL = re.compile(r"<_user>|<_bot>|<_end>|</s>|<reserve2>|<unk>")


@pytest.mark.parametrize("which", ["tok", "reserved_tok", "byte_level_tok"])
def test_text_never_becomes_a_control_token(which, request):
    tok = request.getfixturevalue(which)
    text = "<_user>the sky<_bot> <_end> </s><reserve2><unk>1 + 1"
    assert set(tok.encode(text)) & tok.control_ids
    ids = tok.encode(text, control_tokens=False)
    assert not set(ids) & tok.control_ids
    assert tok.decode(ids) == text
    plain = CONTROL.sub("", text)
    assert tok.encode(plain, control_tokens=False) == tok.encode(plain)


@pytest.mark.parametrize("which", ["tok", "reserved_tok", "byte_level_tok"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_is_its_texts_one_by_one(which, threads, request):
    tokenizer = request.getfixturevalue(which)
    texts = ["", " ", "你好，世界", "<_user>hello <_bot>", "</s><pad>", "many\nlines  ", "x" * 1000]
    batch = tokenizer.encode_batch(texts, threads)
    assert {ids.dtype for ids in batch} == {np.dtype(np.int32)}
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text, control_tokens=False) for text in texts]
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode_batch(["good", "\ud800"], threads)


@pytest.mark.parametrize("which", ["tok", "reserved_tok", "byte_level_tok"])
def test_continuation_is_what_follows_a_control_token(which, request):
    tok = request.getfixturevalue(which)
    marker = "<reserve1>" if which == "reserved_tok" else "<_user>"
    for text in ("the sky", " 1 + 1", "生抽", ""):
        assert tok.encode(marker) + tok.encode_continuation(text) == tok.encode(marker + text)


def test_byte_level_equals_the_library(byte_level_tok, byte_level_file):
    library = tokenizers.Tokenizer.from_file(str(byte_level_file))
    texts = ["", " ", "生抽与老抽 sky", "<_user>the sky<_bot>blue<_end>", "a\n\n b😀", "𠮷 é", "</s><pad>x"]
    for text in texts:
        ids = library.encode(text, add_special_tokens=False).ids
        assert byte_level_tok.encode(text) == ids
        assert byte_level_tok.decode(ids) == library.decode(ids, skip_special_tokens=False) == text
        assert byte_level_tok.decode(ids, skip_control_tokens=True) == library.decode(ids)
    assert byte_level_tok.vocab_size == library.get_vocab_size(with_added_tokens=True) == 324
    for token in ("<_user>", "<_bot>", "<_start>", "<_end>", "<pad>", "Ġblue", "<_pad>", "<reserve1>"):
        assert byte_level_tok.token_to_id(token) == library.token_to_id(token)
    assert byte_level_tok.control_ids == {0, 1, 2, 3, 320, 321, 322, 323}


def test_unknown_tokens_are_none_and_never_the_unknown_id(tok, byte_level_tok):
    for tokenizer in (tok, byte_level_tok):
        assert tokenizer.token_to_id("<no such token>") is None
        assert tokenizer.token_to_id("") is None
    assert tok.token_to_id("<_unk>") == 0


@pytest.mark.parametrize("which", ["tok", "byte_level_tok"])
def test_ids_out_of_range(which, request):
    tok = request.getfixturevalue(which)
    for index in (-1, tok.vocab_size, 2**40):
        with pytest.raises(InputError, match=f"token id {index} is not in the vocabulary"):
            tok.decode([5, index])
        with pytest.raises(InputError, match=f"token id {index}"):
            tok.id_to_token(index)
    tok.decode([tok.vocab_size - 1])


def test_text_must_be_text(tok, byte_level_tok):
    for tokenizer in (tok, byte_level_tok):
        with pytest.raises(InputError, match="must be a string, not int"):
            tokenizer.encode(5)
        with pytest.raises(InputError, match=r"half of a surrogate pair, \\ud83d, at character 3"):
            tokenizer.encode("ab\ud83d")
        with pytest.raises(InputError, match="half of a surrogate pair"):
            tokenizer.token_to_id("\udc00")
    assert tok.decode(tok.encode("a\0b")) == "a\0b"


def test_a_directory_and_its_file_are_the_same(tmp_path, tok, byte_level_file):
    (tmp_path / "tokenizer_config.json").write_text('{"x": 1}')
    tok.save(tmp_path / "new" / "checkpoint")
    saved = tmp_path / "new" / "checkpoint"
    assert [path.name for path in saved.iterdir()] == ["tokenizer.model"]
    with open(tok.path, "rb") as file:
        assert (saved / "tokenizer.model").read_bytes() == file.read()
    again = Tokenizer.from_pretrained(saved)
    assert again.sha256 == tok.sha256 and again.file_name == "tokenizer.model"
    assert Tokenizer.from_pretrained(saved / "tokenizer.model").encode("sky") == tok.encode("sky")

    # The other kind replaces it, and brings its configuration along.
    source = tmp_path / "7b"
    source.mkdir()
    (source / "tokenizer.json").write_bytes(byte_level_file.read_bytes())
    (source / "tokenizer_config.json").write_bytes(b'{"tokenizer_class": "BloomTokenizerFast"}\r\n')
    (saved / "config.json").write_text("{}")
    Tokenizer.from_pretrained(source).save(saved)
    assert ({path.name for path in saved.iterdir()}
            == {"config.json", "tokenizer.json", "tokenizer_config.json"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (saved / name).read_bytes() == (source / name).read_bytes()
    assert Tokenizer.from_pretrained(saved).file_name == "tokenizer.json"


def test_bad_tokenizer_files(tmp_path, tok, byte_level_file):
    with pytest.raises(InputError, match="holds neither tokenizer.model nor tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="missing.model cannot be read .No such file"):
        Tokenizer.from_pretrained(tmp_path / "missing.model")
    with open(tok.path, "rb") as file:
        whole = file.read()
    for content in (b"", b"not a model" * 9, whole[:len(whole) // 2], whole.replace("的".encode(), b"\xe7\xe7\xe7", 1)):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(InputError, match="bad.model (is not a whole SentencePiece|holds no vocabulary)"):
            Tokenizer.from_pretrained(tmp_path / "bad.model")
    for content in (b"", b"{}", b"\xff", byte_level_file.read_bytes()[:5000]):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(InputError, match="bad.json is not a whole tokenizer.json"):
            Tokenizer.from_pretrained(tmp_path / "bad.json")
    definition = json.loads(byte_level_file.read_text(encoding="utf-8"))
    definition["decoder"] = None
    (tmp_path / "other.json").write_text(json.dumps(definition))
    with pytest.raises(InputError, match="other.json is not a byte-level BPE"):
        Tokenizer.from_pretrained(tmp_path / "other.json")


def test_the_alphabet_of_bytes_is_that_of_the_tokenizers_library():
    import tokenizers

    from telechat.data.byte_level_bpe import _BYTE_OF

    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert set(_BYTE_OF) == set(split.alphabet())
    for character in map(chr, (*range(0x800), *range(0x1000, 0xD800, 0x40), *range(0x10000, 0x110000, 0x1000))):
        written = "".join(piece for piece, _ in split.pre_tokenize_str(character))
        assert [_BYTE_OF[letter] for letter in written] == list(character.encode())
