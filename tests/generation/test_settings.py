"""generation_config.json as transformers and people write it."""

import json
import shutil
import types

import pytest

from telechat import TeleChatConfig
from telechat.errors import InputError
from telechat.generation.sampling import SamplingParams
from telechat.generation.session import sampling_params
from telechat.generation.settings import GenerationSettings
from tests.conftest import ROOT

CONFIG = TeleChatConfig(vocab_size=1664, hidden_size=32, n_layer=1, n_head=4, ffn_hidden_size=48, training_seqlen=4096)


@pytest.fixture
def load(tmp_path):
    """load(content) → GenerationSettings of a directory whose generation_config.json holds that (dict or bytes)."""
    def call(content=None):
        shutil.copy(ROOT / "samples" / "tokenizer.model", tmp_path)
        if content is not None:
            (tmp_path / "generation_config.json").write_bytes(
                content if isinstance(content, bytes) else json.dumps(content).encode())
        return GenerationSettings.load(tmp_path, CONFIG)
    return call


@pytest.mark.parametrize("given, stop_ids", [
    ([2, 3], (2, 3)), ([3], (2, 3)), (3, (2, 3)), (3.0, (2, 3)), ([1000, 3], (2, 3, 1000)), (None, (2,)), ([], (2,)),
    ([2, 1_000_000, -1], (2,)),  # ids that the tokenizer has not are never drawn
])
def test_each_token_of_eos_token_id_ends_an_answer(load, given, stop_ids):
    assert load({"eos_token_id": given}).stop_ids == stop_ids


def test_null_is_as_if_the_field_were_not_there(load):
    names = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_length", "eos_token_id",
             "user_token_id", "bot_token_id", "pad_token_id", "bos_token_id")
    absent, null = load(), load(dict.fromkeys(names))
    assert (absent.sampling, absent.max_length, absent.stop_ids, absent.chat_format) == \
        (null.sampling, null.max_length, null.stop_ids, null.chat_format)
    assert absent.sampling == {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    assert absent.max_length == 2048


def test_what_transformers_writes(load):
    settings = load(b"\xef\xbb\xbf" + json.dumps({
        "_from_model_config": True, "do_sample": True, "temperature": 1, "top_k": 50.0, "top_p": 1, "max_length": 100.0,
        "bad_words_ids": None, "cache_implementation": None, "transformers_version": "4.53.3"}).encode())
    assert settings.sampling == {"temperature": 1, "top_k": 50, "top_p": 1, "repetition_penalty": 1.0}
    assert settings.max_length == 100 and type(settings.max_length) is type(settings.sampling["top_k"]) is int
    SamplingParams(5, **settings.sampling)


def test_the_longest_answer(load):
    """It counts where nobody asks for another, and leaves the longest sequence alone, as TeleChat2's file has it."""
    settings, generator = load({"max_new_tokens": 7.0}), types.SimpleNamespace(max_length=100)
    assert (settings.max_new_tokens, settings.max_length, "max_new_tokens" in settings.sampling) == (7, 2048, False)
    assert sampling_params(settings, generator, max_new_tokens=None).max_new_tokens == 7
    assert sampling_params(settings, generator, max_new_tokens=9).max_new_tokens == 9
    assert sampling_params(load({}), generator).max_new_tokens == 100


def test_what_would_change_an_answer_is_not_passed_over_in_silence(load, capsys):
    load({"num_beams": 4, "no_repeat_ngram_size": 3, "min_p": 0.0, "typical_p": 1.0, "bad_words_ids": [], "num_return_sequences": 1})
    assert capsys.readouterr().err.endswith(
        "generation_config.json: num_beams, no_repeat_ngram_size not supported; answers are made without\n")
    load({"num_beams": 1, "do_sample": True, "penalty_alpha": None})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("do_sample", [False, None])
def test_a_temperature_counts_only_where_it_is_sampled(load, do_sample):
    assert load({"do_sample": do_sample, "temperature": 0.7}).sampling["temperature"] == 0.0
    assert load({"do_sample": True, "temperature": 0.7}).sampling["temperature"] == 0.7
    assert load({"do_sample": True}).sampling["temperature"] == 1.0


@pytest.mark.parametrize("content, said", [
    ({"do_sample": "yes"}, "do_sample must be true or false, not 'yes'"),
    ({"do_sample": 1}, "do_sample must be true or false, not 1"),
    ({"temperature": "hot"}, "temperature must be a number at least 0, not 'hot'"),
    ({"temperature": True}, "temperature must be a number at least 0, not True"),
    ({"temperature": -1}, "temperature must be a number at least 0, not -1"),
    (b'{"temperature": NaN}', "temperature must be a number at least 0, not nan"),
    (b'{"temperature": 1e999}', "temperature must be a number at least 0, not inf"),
    ({"top_k": 1.5}, "top_k must be a whole number of at least 0, not 1.5"),
    ({"top_k": -1}, "top_k must be a whole number of at least 0, not -1"),
    ({"top_p": 0}, "top_p must be a number above 0 and at most 1, not 0"),
    ({"top_p": 2}, "top_p must be a number above 0 and at most 1, not 2"),
    ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0, not 0"),
    ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, not 0"),
    ({"max_length": 0}, "max_length must be a whole number of at least 1, not 0"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list of token ids, not '</s>'"),
    ({"eos_token_id": [[2]]}, r"eos_token_id must be a token id or a list of token ids, not \[\[2\]\]"),
    ({"eos_token_id": True}, "eos_token_id must be a token id or a list of token ids, not True"),
    ({"user_token_id": [20, 21]}, r"user_token_id must be one token id, not \[20, 21\]"),
])
def test_a_wrong_field_is_named_with_its_file(load, content, said):
    with pytest.raises(InputError, match=f"generation_config.json: {said}; mend it or remove it$"):
        load(content)


@pytest.mark.parametrize("content, said", [
    (b"", "is empty; mend it or remove it"), (b"[]", "must hold a JSON object"), (b"{", "is not valid JSON"),
    ("{}".encode("utf-16"), "is not UTF-8 but UTF-16"), (b'{"top_k": 1, "top_k": 2}', 'gives the field "top_k" twice'),
    (b'{"top_k": ' + b"9" * 5000 + b"}", "holds a number of thousands of digits"), (b"[" * 100_000, "nested too deeply"),
    (b'{"a": "\\ud800"}', "holds half of a surrogate pair"),
])
def test_a_broken_file_is_named(load, content, said):
    with pytest.raises(InputError, match=f"generation_config.json .*{said}"):
        load(content)


def test_a_link_to_itself_is_named(load, tmp_path):
    (tmp_path / "generation_config.json").symlink_to("generation_config.json")
    with pytest.raises(InputError, match="generation_config.json cannot be read .*mend it or remove it"):
        load()
