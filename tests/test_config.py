"""TeleChatConfig reads the published files, writes them back, and refuses what is no model."""

import dataclasses
import json

import pytest

from telechat import InputError, TeleChatConfig
from telechat.config import YarnScaling


@pytest.mark.parametrize("model, expected", [
    ("telechat_7b", dict(hidden_size=4096, n_layer=30, n_head=32, ffn_hidden_size=12288, vocab_size=160256, hidden_dropout=0.1,
                         attention_dropout=0.1, tie_word_embeddings=True, use_bias=True, rotary_ntk_context=4096)),
    ("telechat_12b", dict(hidden_size=5120, n_layer=38, n_head=32, ffn_hidden_size=12288, vocab_size=120000,
                          hidden_dropout=0.0, tie_word_embeddings=False, use_bias=True, rotary_ntk_context=8192)),
    ("telechat_52b", dict(hidden_size=8192, n_layer=64, n_head=64, ffn_hidden_size=21824, vocab_size=80896,
                          training_seqlen=4096, tie_word_embeddings=False, use_bias=False, logits_scale=1 / 32)),
    ("telechat2_115b", dict(hidden_size=8192, n_layer=96, n_head=64, num_key_value_heads=8, head_dim=128,
                            ffn_hidden_size=40960, layer_norm_epsilon=1e-8, use_bias=True, rotary_ntk_context=8192,
                            rotary_float16=True, training_seqlen=8192, tie_word_embeddings=False)),
    ("telechat3_36b", dict(hidden_size=6144, n_layer=64, n_head=48, num_key_value_heads=8, head_dim=128,
                           ffn_hidden_size=24576, layer_norm_epsilon=1e-5, use_bias=False, rotary_base=1e6,
                           training_seqlen=32768, rotary_ntk_context=None, yarn=YarnScaling(8192, 32.0, 1.0))),
])
def test_published_files(shared, model, expected):
    path = shared / "data" / f"{model}.config.json"
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


@pytest.mark.parametrize("size", ["7b", "12b", "52b"])
def test_as_transformers_writes_them(shared, tmp_path, size):
    """A byte order mark, whole numbers as 1.0, null for what is optional, several end tokens, fields of its own."""
    values = json.loads((shared / "data" / f"telechat_{size}.config.json").read_text())
    plain = TeleChatConfig.from_dict(values)
    optional = {"bos_token_id", "pad_token_id", "num_key_value_heads", "layer_norm_epsilon", "position_embedding"}
    written = {name: float(value) if type(value) is int else value for name, value in values.items()}
    written = {**written, **dict.fromkeys(optional), "eos_token_id": [2, 3], "dtype": "bfloat16", "torch_dtype": None}
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(written).encode())
    config = TeleChatConfig.from_pretrained(tmp_path)
    assert dataclasses.replace(config, eos_token_id=2) == plain and config.eos_token_id == (2, 3)
    assert all(type(getattr(config, name)) is int for name in ("vocab_size", "hidden_size", "n_layer", "n_head"))
    assert config.to_dict() == written  # what was published stays as it was


@pytest.mark.parametrize("name, value, said", [
    ("n_layer", True, "n_layer must be a whole number from 1 to 2147483647, not True"),
    ("n_layer", 10 ** 30, "n_layer must be a whole number from 1 to 2147483647, not 1000"),
    ("hidden_size", 8.5, "hidden_size must be a whole number from 1 to 2147483647, not 8.5"),
    ("layer_norm_epsilon", "1e-5", "layer_norm_epsilon must be a number above 0, not '1e-5'"),
    ("layer_norm_epsilon", 10 ** 400, "layer_norm_epsilon must be a number above 0, not 1000"),
    ("hidden_dropout", False, "hidden_dropout must be a number at least 0 and below 1, not False"),
    ("tie_word_embeddings", "no", "tie_word_embeddings must be true or false, not 'no'"),
    ("use_bias", 1, "use_bias must be true or false, not 1"),
    ("pad_token_id", [3, 4], r"pad_token_id must be one token id, not \[3, 4\]"),
    ("eos_token_id", ["2"], r"eos_token_id must be a token id or a list of token ids, not \['2'\]"),
    ("position_embedding", 3, "position_embedding must be one of rotary, alibi, not 3"),
    ("vocab_size", None, "the field vocab_size is missing"),
])
def test_a_wrong_field_is_named_with_its_file(tmp_path, name, value, said):
    values = {**dict(vocab_size=10, hidden_size=8, n_layer=1, n_head=2, ffn_hidden_size=12), name: value}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"config.json: {said}"):
        TeleChatConfig.from_pretrained(tmp_path)


LLAMA = dict(model_type="telechat3", vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
             intermediate_size=12, head_dim=6, num_key_value_heads=1, rms_norm_eps=1e-6, rope_theta=5e5,
             max_position_embeddings=64, tie_word_embeddings=False)
ROPE = dict(original_max_position_embeddings=16, factor=4.0)


@pytest.mark.parametrize("kinds", [dict(type="telechat3-yarn"), dict(rope_type="telechat3-yarn"),
                                   dict(type="telechat3-yarn", rope_type="telechat3-yarn")])
def test_either_spelling_of_the_rope_type(kinds):
    """The factor of the file is not used: the lengths say it. What is changed is written in the file's own names."""
    config = TeleChatConfig.from_dict({**LLAMA, "rope_scaling": {**ROPE, **kinds, "factor": 99.0}})
    assert config.yarn == YarnScaling(16) and config.head_dim == 6 and config.style == "llama"
    changed = dataclasses.replace(config, n_layer=3, layer_norm_epsilon=1e-4, yarn=YarnScaling(8, 16.0, 2.0))
    values = changed.to_dict()
    assert values["num_hidden_layers"] == 3 and values["rms_norm_eps"] == 1e-4 and "n_layer" not in values
    assert values["rope_scaling"]["beta_fast"] == 16.0 and values["rope_scaling"]["factor"] == 8.0
    assert TeleChatConfig.from_dict(json.loads(json.dumps(values))) == changed


def test_a_field_of_ours_that_no_file_has_is_none_of_the_model():
    published = {"vocab_size": 56, "hidden_size": 48, "n_layer": 1, "n_head": 3, "ffn_hidden_size": 40}
    assert TeleChatConfig.from_dict({**published, "yarn": []}).yarn is None


@pytest.mark.parametrize("scaling", [None, {"rope_type": "default"}])
def test_no_rope_scaling(scaling):
    config = TeleChatConfig.from_dict({**LLAMA, "rope_scaling": scaling})
    assert config.yarn is None and config.rotary_ntk_context is None


@pytest.mark.parametrize("values, words", [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling must be of the type .* its type is 'linear'"),
    ({"rope_scaling": {"type": "yarn", "rope_type": "telechat3-yarn"}}, "'telechat3-yarn' and 'yarn'"),
    ({"rope_scaling": {"factor": 2.0}}, "its type is none"), ({"rope_scaling": 4}, "an object or null, not 4"),
    ({"rope_scaling": {"type": "telechat3-yarn"}}, "lacks original_max_position_embeddings"),
    ({"rope_scaling": {**ROPE, "type": "telechat3-yarn", "beta_fast": 0}}, "rope_scaling.beta_fast must be a number above 0, not 0"),
    ({"attention_bias": True}, "attention_bias and mlp_bias must be false"),
    ({"mlp_bias": True}, "attention_bias and mlp_bias must be false"),
    ({"model_type": "llama"}, "model_type is 'llama', which is not supported; TeleChat-1, TeleChat2"),
    ({"model_type": "qwen2"}, "'qwen2'"), ({"model_type": None}, "model_type is missing"),
    ({"head_dim": 5}, "must be even"), ({"head_dim": "6"}, "head_dim must be a whole number from 1 to 2147483647, not '6'"),
])
def test_other_families_and_extensions_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        TeleChatConfig.from_dict({**LLAMA, **values})


def test_rope_parameters_as_transformers_5_writes_them():
    """One object in the place of rope_scaling, with the base in it; what a change makes untrue is not left beside it."""
    values = {**LLAMA, "rope_parameters": {**ROPE, "rope_theta": 7e5, "rope_type": "telechat3-yarn", "type": "telechat3-yarn"}}
    del values["rope_theta"]
    config = TeleChatConfig.from_dict(values)
    assert (config.yarn, config.rotary_base) == (YarnScaling(16), 7e5)
    assert dataclasses.replace(config, n_layer=3).to_dict() == {**values, "num_hidden_layers": 3}
    for change in (dict(rotary_base=5e4), dict(yarn=None), dict(yarn=YarnScaling(8))):
        changed = dataclasses.replace(config, **change)
        assert TeleChatConfig.from_dict(changed.to_dict()) == changed
    plain = TeleChatConfig.from_dict({**values, "rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}})
    assert (plain.yarn, plain.rotary_base) == (None, 7e5)
    del values["rope_parameters"]
    assert TeleChatConfig.from_dict(values).rotary_base == 1e6  # where the official class has it


def test_multipliers_without_mup():
    values = dict(n_embd=8, vocab_size=10, n_layer=1, n_head=2, input_mult=2.0, output_mult=3.0, mup_scale_factor=4.0)
    config = TeleChatConfig.from_dict({**values, "use_mup": False})
    assert (config.input_mult, config.logits_scale) == (1.0, 1.0)
    assert config.to_dict() == {"model_type": "telechat", **values, "use_mup": False}
    changed = dataclasses.replace(config, input_mult=5.0)
    assert TeleChatConfig.from_dict(changed.to_dict()) == changed
    assert TeleChatConfig.from_dict({**values, "use_mup": True}).logits_scale == 0.75


@pytest.mark.parametrize("values, words", [
    ({**LLAMA, "hidden_act": "gelu"}, "hidden_act is 'gelu', which no published TeleChat has; only 'silu' is supported"),
    ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
    ({"embed_layernorm": True}, "embed_layernorm is True, which no published TeleChat has; only False is supported"),
    ({"n_embd": 8, "rotary_use_xpos": True}, "rotary_use_xpos"), ({"n_embd": 8, "use_RMSNorm": False}, "use_RMSNorm is False"),
    ({"n_embd": 8, "activation_function": "gelu_new"}, "activation_function"),
    ({"n_embd": 8, "relative_encoding": "learned"}, "relative_encoding"),
    ({"n_embd": 8, "scale_attn_weights": False}, "scale_attn_weights is False"),
])
def test_what_no_published_model_has_is_refused(values, words):
    with pytest.raises(InputError, match=words):
        TeleChatConfig.from_dict(values)


def test_another_family_in_the_published_style_is_refused():
    with pytest.raises(InputError, match="model_type is 'bloom', which is not supported"):
        TeleChatConfig.from_dict({"model_type": "bloom", "vocab_size": 10, "hidden_size": 8, "n_layer": 1, "n_head": 2})


def test_base_seqlen_is_the_context_of_ntk():
    values = dict(vocab_size=10, hidden_size=8, n_layer=1, n_head=2, ffn_hidden_size=12, training_seqlen=32768,
                  base_seqlen=4096, tie_word_embeddings=False)
    config = TeleChatConfig.from_dict(values)
    assert (config.rotary_ntk_context, config.training_seqlen) == (4096, 32768)
    assert dataclasses.replace(config, rotary_ntk_context=77).to_dict()["base_seqlen"] == 77
