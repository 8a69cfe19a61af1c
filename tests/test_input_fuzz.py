"""Files that people write, at random: each is read, or refused in one sentence; never a traceback.

Some 2,000 examples in all; what is read is checked against the bounds that the docstrings promise.
"""

import json
import math

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from telechat.config import TeleChatConfig
from telechat.data.conversation import parse_conversation, read_conversations
from telechat.errors import InputError
from telechat.generation.settings import read_generation_config
from telechat.training.run_config import RunConfig, parse_yaml

HUGE = 10 ** 400  # more than a float holds
numbers = st.one_of(st.integers(), st.integers(-2, 40), st.floats(), st.sampled_from([1.0, 2.0, HUGE, -HUGE, 2 ** 63]))
texts = st.one_of(st.text(max_size=20), st.sampled_from(["", "1e-5", "2024-05-01", "true", "~", "\ud800", "\0", "nan"]))
values = st.recursive(st.one_of(st.none(), st.booleans(), numbers, texts),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6)
GOOD = {"vocab_size": 56, "hidden_size": 48, "n_layer": 1, "n_head": 3, "ffn_hidden_size": 40}
GOOD_52B = {"vocab_size": 56, "n_embd": 48, "n_layer": 1, "n_head": 3, "n_inner": 40, "n_positions": 64}
CONFIG_FIELDS = [*TeleChatConfig.__dataclass_fields__, "n_embd", "n_inner", "rotary_theta", "torch_dtype", "dtype"]
GENERATION_FIELDS = ["do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_length", "eos_token_id",
                     "user_token_id", "bot_token_id", "transformers_version", "pad_token_id", "max_new_tokens"]
RUN_FIELDS = [name for name in [*RunConfig.__dataclass_fields__, *RunConfig.__dataclass_fields__["train"].
                                default_factory.__dataclass_fields__] if name != "train"]
examples = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def or_refused(function, *arguments):
    """What a function gives, or None and one sentence that can be printed anywhere."""
    try:
        return function(*arguments)
    except InputError as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 600, text
        text.encode("utf-8", "backslashreplace")
        return None


@settings(max_examples=500, **examples)
@given(st.sampled_from([GOOD, GOOD_52B]), st.dictionaries(st.sampled_from(CONFIG_FIELDS), values, max_size=4))
def test_config_json(good, changes):
    config = or_refused(TeleChatConfig.from_dict, {**good, **changes})
    if config is not None:
        assert config.hidden_size % config.n_head == 0 and isinstance(config.n_layer, int) and config.n_layer > 0
        assert 0 <= config.hidden_dropout < 1 and math.isfinite(config.layer_norm_epsilon)
        assert TeleChatConfig.from_dict(config.to_dict()) == config


@settings(max_examples=500, **examples)
@given(content=st.one_of(
    st.dictionaries(st.sampled_from(GENERATION_FIELDS), values, max_size=6).map(lambda d: _json(d)),
    st.binary(max_size=60), values.map(lambda value: _json(value))), mark=st.sampled_from([b"", b"\xef\xbb\xbf"]))
def test_generation_config_json(tmp_path_factory, content, mark):
    path = tmp_path_factory.getbasetemp() / "generation_config.json"
    path.write_bytes(mark + content)
    read = or_refused(read_generation_config, str(path))
    if read is not None:
        assert read["do_sample"] in (True, False) and read["temperature"] >= 0 and 0 < read["top_p"] <= 1
        assert type(read["top_k"]) is type(read["max_length"]) is int and read["repetition_penalty"] > 0
        assert all(type(index) is int for index in read["eos_token_id"])


def _json(value):
    return json.dumps(value).encode()


@settings(max_examples=300, **examples)
@given(st.dictionaries(st.sampled_from([*RUN_FIELDS, "model", "parallel"]), values, max_size=4))
@example({"epochs": 1})
def test_values_of_a_run(changes):
    config = or_refused(RunConfig.from_dict, changes)
    if config is not None:
        assert type(config.batch_size) is int and type(config.train.total_steps) is int
        assert RunConfig.from_dict(config.to_dict()) == config


plain = st.text(alphabet="ab:-[]{}#&*!|>'\"%@`,?=~ \n\t0159.eE_xo<\\\u00a0\ufeff", max_size=40)


@settings(max_examples=300, **examples)
@given(st.one_of(plain, plain.map(lambda text: f"batch_size: {text}\n"), st.text(max_size=40)))
def test_yaml(text):
    found = or_refused(parse_yaml, text)
    if isinstance(found, dict):
        or_refused(RunConfig.from_dict, found)


record = st.fixed_dictionaries({}, optional={
    "input": st.one_of(values, st.lists(st.sampled_from(["<_user>", "<_bot>", "q", " ", "<_end>"])).map("".join)),
    "output": texts, "instruction": texts, "system": st.one_of(st.none(), texts), "id": values, "x": values,
    "history": st.one_of(values, st.lists(st.lists(texts, min_size=2, max_size=2), max_size=2)),
    "messages": st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]),
                                                "content": st.one_of(texts, values)}), max_size=4),
    "conversations": st.lists(st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]),
                                                     "value": texts}), max_size=4)})


@settings(max_examples=300, **examples)
@given(record, st.sampled_from(["refuse", "prepend"]))
def test_records(record, system):
    turns = or_refused(parse_conversation, record, (), system)
    if turns is not None:
        assert turns and all(isinstance(text, str) for turn in turns for text in turn)
        said = "".join(text for turn in turns for text in turn)
        # Nothing is lost: a system text is part of what was said, and an unknown field was empty.
        assert (record.get("system") or "") in said and record.get("x") in (None, "", [], {})


@settings(max_examples=150, **examples)
@given(st.lists(st.one_of(record.map(_json), values.map(_json), st.binary(max_size=20)), max_size=3))
def test_lines(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(b"\n".join(lines))
    or_refused(read_conversations, path)


@pytest.mark.parametrize("text, said", [
    ("batch_size: 2\nseed: 1\nbatch_size: 4\n", "line 3: gives the key batch_size twice; keep one"),
    ("model: {n_layer: 1, n_layer: 2}", "gives the key n_layer twice"),
    ("batch_size: " + "7" * 5000, "a number of thousands of digits"),
    ("[" * 2000, "is not valid YAML"), ("a: !!int x", "is not valid YAML"), ("a: !!python/object:os.system x", "not valid YAML"),
    ("a: *b", "is not valid YAML"), ("? [a]\n: b", "is not valid YAML"), ("a:\tb: c", "is not valid YAML"),
])
def test_yaml_that_is_refused(text, said):
    with pytest.raises(InputError, match=said):
        parse_yaml(text)


def test_dates_are_text_and_numbers_without_a_dot_are_numbers():
    assert parse_yaml("output_dir: 2024-05-01\nseed: 0x10") == {"output_dir": "2024-05-01", "seed": 16}
    assert yaml.safe_load("output_dir: 2024-05-01")["output_dir"] != "2024-05-01"
    config = RunConfig.from_dict(parse_yaml("output_dir: 2024-05-01\nlearning_rate: 1e-5\ntotal_steps: 1e3\n"
                                            "model: {layer_norm_epsilon: 1e-6}\nbetas: [9e-1, 95e-2]\nbatch_size: 2.0"))
    assert config.output_dir == "2024-05-01" and config.train.learning_rate == 1e-5 and config.batch_size == 2
    assert config.train.total_steps == 1000 and config.train.betas == (0.9, 0.95)
    assert config.model == {"layer_norm_epsilon": 1e-6}


def test_a_number_of_thousands_of_digits_is_called_what_it_is():
    with pytest.raises(InputError, match="^batch_size must be a whole number from 1 to 9007199254740992, "
                                         "not a value too large to be shown$"):
        RunConfig.from_dict(parse_yaml("batch_size: 0x" + "f" * 5000))
