"""Tokenizers of the three kinds, small ones for tests that do without ../shared."""

import io
import pathlib

import pytest
import sentencepiece
import tokenizers

from telechat.data.tokenizer import Tokenizer

SAMPLES = pathlib.Path(__file__).resolve().parents[2] / "samples"
TEXTS = ["生抽与老抽的区别？", "生抽颜色浅，老抽颜色深。", "the sky is blue, the sea is blue too", "1 + 1 = 2 😀"] * 3


@pytest.fixture
def samples():
    """The folder of the demo's conversations and vocabulary."""
    return SAMPLES


@pytest.fixture(scope="session")
def reserved_tok(tmp_path_factory):
    """A small SentencePiece tokenizer with 52B's control tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, model_type="bpe", vocab_size=360,
        character_coverage=1.0, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, pad_id=3, minloglevel=2,
        user_defined_symbols=[*"0123456789", *(f"<reserve{n}>" for n in range(1, 6))])
    path = tmp_path_factory.mktemp("reserved") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return Tokenizer.from_pretrained(path)


@pytest.fixture(scope="session")
def byte_level_file(tmp_path_factory):
    """A tokenizer.json as 7B's: byte-level BPE, the control tokens added behind the vocabulary."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())))
    library.add_special_tokens(["<_user>", "<_bot>", "<_start>", "<_end>"])
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    library.save(str(path))
    return path


@pytest.fixture(scope="session")
def byte_level_tok(byte_level_file):
    return Tokenizer.from_pretrained(byte_level_file)
