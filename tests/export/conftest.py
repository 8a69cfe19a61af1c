"""Tokenizers for the tests of the exports."""

import pytest
import tokenizers

from tests.conftest import ROOT


@pytest.fixture
def save_byte_level():
    """save_byte_level(folder, splitting) writes a tokenizer.json as 7B's."""
    def save(folder, splitting):
        """Words are cut as GPT-2 or BLOOM does it, or by "whitespace"."""
        steps = tokenizers.pre_tokenizers
        library = tokenizers.Tokenizer(tokenizers.models.BPE())
        library.pre_tokenizer = steps.ByteLevel(add_prefix_space=False)
        if splitting == "bloom":
            bloom = steps.Split(tokenizers.Regex(" ?[^(\\s|[.,!?…。，、।۔،])]+"), "isolated")
            library.pre_tokenizer = steps.Sequence([bloom, steps.ByteLevel(add_prefix_space=False, use_regex=False)])
        if splitting == "whitespace":
            library.pre_tokenizer = steps.Sequence([steps.Whitespace(), steps.ByteLevel(add_prefix_space=False)])
        library.decoder = tokenizers.decoders.ByteLevel()
        lines = (ROOT / "samples/conversations.jsonl").read_text(encoding="utf-8").splitlines()
        library.train_from_iterator(lines, tokenizers.trainers.BpeTrainer(
            vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], show_progress=False,
            initial_alphabet=sorted(steps.ByteLevel.alphabet())))
        library.add_special_tokens(["<_user>", "<_bot>", "<_start>", "<_end>"])
        library.save(str(folder / "tokenizer.json"))
    return save
