"""TeleChatConfig reads the published files, writes them back, and refuses what is no model."""

import dataclasses
import json

import pytest

from telechat import InputError, TeleChatConfig


@pytest.mark.parametrize("size, expected", [
    ("7b", dict(hidden_size=4096, n_layer=30, n_head=32, ffn_hidden_size=12288, vocab_size=160256, hidden_dropout=0.1,
                attention_dropout=0.1, tie_word_embeddings=True, use_bias=True, rotary_ntk_context=4096)),
    ("12b", dict(hidden_size=5120, n_layer=38, n_head=32, ffn_hidden_size=12288, vocab_size=120000,
                 hidden_dropout=0.0, tie_word_embeddings=False, use_bias=True, rotary_ntk_context=8192)),
    ("52b", dict(hidden_size=8192, n_layer=64, n_head=64, ffn_hidden_size=21824, vocab_size=80896,
                 training_seqlen=4096, tie_word_embeddings=False, use_bias=False, logits_scale=1 / 32)),
])
def test_published_files(shared, size, expected):
    path = shared / "data" / f"telechat_{size}.config.json"
    config = TeleChatConfig.from_pretrained(path)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.to_dict() == json.loads(path.read_text())
    changed = dataclasses.replace(config, n_layer=3, hidden_dropout=0.25, position_embedding="alibi")
    assert TeleChatConfig.from_dict(changed.to_dict()) == changed


def test_round_trip_of_a_new_config():
    config = TeleChatConfig(vocab_size=10, hidden_size=8, n_layer=1, n_head=2, ffn_hidden_size=12, use_bias=False,
                            tie_word_embeddings=True, rotary_ntk_context=777, num_key_value_heads=1)
    assert TeleChatConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("change, words", [
    ({"n_head": 3}, "hidden_size 8 must be a multiple of n_head 3"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ({"vocab_size": 0}, "vocab_size"), ({"n_layer": "2"}, "n_layer"), ({"hidden_dropout": 1.0}, "hidden_dropout"),
    ({"layer_norm_epsilon": 0}, "layer_norm_epsilon"), ({"position_embedding": "none"}, "position_embedding"),
    ({"hidden_size": 6}, "even"), ({"initializer_range": "small"}, "initializer_range"),
])
def test_wrong_values_are_refused(change, words):
    values = {**dict(vocab_size=10, hidden_size=8, n_layer=1, n_head=2, ffn_hidden_size=12), **change}
    with pytest.raises(InputError, match=words):
        TeleChatConfig(**values)


@pytest.mark.parametrize("content, words", [
    ("{", "not valid JSON"), ("[]", "JSON object"), ('{"hidden_size": 8}', "vocab_size is missing"),
])
def test_broken_files_are_refused(tmp_path, content, words):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=words) as caught:
        TeleChatConfig.from_pretrained(tmp_path)
    assert "config.json" in str(caught.value)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="config.json"):
        TeleChatConfig.from_pretrained(tmp_path)
