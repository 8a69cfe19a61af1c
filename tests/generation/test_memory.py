"""Bytes of weights and cache against those of a real model and engine, and what of them fits."""

import pytest

from telechat import InputError, TeleChat
from telechat.generation import memory
from telechat.generation.card_memory import card_memory, plan_card_cache
from telechat.generation.engine import Engine
from telechat.generation.memory import (FRAMEWORK, CachePlan, cache_bytes, check_inference_memory, inference_memory,
                                        plan_cache, weight_bytes)
from telechat.parallel import rendezvous
from tests.test_model import small_config


def test_bytes_are_those_of_the_tensors():
    config = small_config()
    model = TeleChat(config)
    engine = Engine(model, 64)
    engine.reserve(3, 64)
    held = sum(cache.nbytes for layer in engine._cache.layers for cache in layer[2:])
    assert cache_bytes(config, 3, 64, 4) * 13 == held * 12, "twelve blocks, and one that is not read"
    assert cache_bytes(config, 3, 64, 4, processes=2) * 2 == cache_bytes(config, 3, 64, 4)
    assert weight_bytes(config, 4) == sum(parameter.nbytes for parameter in model.get_parameters())
    parts = inference_memory(config, "float32", 64, 1, 3, 64)
    assert parts["weights"] == weight_bytes(config, 4) and parts["key-value cache"] == cache_bytes(config, 3, 64, 4)
    assert parts["framework"] == FRAMEWORK


def test_what_processes_share_is_there_once_and_each_brings_a_framework():
    one, four = (inference_memory(small_config(), "float32", 64, 1, 4, 64, processes=count) for count in (1, 2))
    assert (four["weights"], four["key-value cache"]) == (one["weights"], one["key-value cache"])
    assert four["framework"] == 2 * FRAMEWORK
    here = inference_memory(small_config(), "float32", 64, 1, 4, 64, processes=2, local=1)
    assert [2 * size for size in here.values()] == list(four.values())


def test_lower_weights_are_there_in_float32_too_where_they_are_used():
    wide, low = (inference_memory(small_config(), dtype, 8) for dtype in ("float32", "bfloat16"))
    assert low["weights"] * 2 == wide["weights"] and low["work"] > wide["work"]


@pytest.mark.parametrize("shape, dtype, numbers", [
    # Of 300 rows: 10 of the width, 3 of queries, keys and values on each of two processes; 3 of the scores; gate, up and
    # their product; 7 of the logits; the rotary tables.
    (dict(prompt=100, prompts=3, length=200, logits=50, processes=2, local=1), "float32",
     300 * (10 * 32 + 3 * 32) + 3 * 3 * 2 * 100 * 100 + 3 * 300 * 24 + 7 * 50 * 96 + 2 * 200 * 8),
    # Two blocks of 7,808 weights in float32, half of them here.
    (dict(prompt=100, prompts=3, length=200, logits=50, processes=2, local=1), "bfloat16",
     300 * (10 * 32 + 3 * 32) + 3 * 3 * 2 * 100 * 100 + 3 * 300 * 24 + 7 * 50 * 96 + 2 * 200 * 8 + 7808),
    # A long one: 2^19 scores of a head are there at a time, its feed-forward 2,048 rows at a time.
    (dict(prompt=3000), "float32", 3000 * (10 * 32 + 3 * 64) + 3 * 4 * 2 ** 19 + 3 * 2048 * 48 + 7 * 96),
])
def test_the_work_of_a_prompt(shape, dtype, numbers):
    config = small_config(num_key_value_heads=2)
    assert inference_memory(config, dtype, **shape)["work"] == 4 * numbers


def test_a_tensor_is_there_twice_while_it_is_read():
    assert inference_memory(small_config(vocab_size=96_000, hidden_size=512), "float32", 1)["work"] == 4 * 96_000 * 512
    assert inference_memory(small_config(vocab_size=96_000, hidden_size=512), "float32", 1, processes=2)["work"] == 2 * 4 * 96_000 * 256


def test_lower_weights_are_advised_where_weights_are_most(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1)
    for vocabulary, dtype, advised in ((10_000_000, "float32", True), (10_000_000, "bfloat16", False), (96, "float32", False)):
        with pytest.raises(InputError) as refused:
            check_inference_memory(small_config(vocab_size=vocabulary), dtype, "lower --max_length", prompt=1)
        assert ("are available: lower --max_length, give --dtype bfloat16, or" in str(refused.value)) == advised


def test_the_default_cache_is_what_fits():
    """All that the sequences can have, or what is free less a tenth; for less than one, length goes down, to 128."""
    config = small_config()

    def needed(tokens, length):
        return sum(inference_memory(config, "float32", length, 1, 0, length, 8, cached=tokens).values()) / 0.9 + 1

    def chosen(available, **settings):
        return tuple(plan_cache(config, "float32", 8, 8192, available, **settings))
    assert chosen(None) == chosen(needed(65536, 8192)) == (8, 8192, 65536)
    assert chosen(needed(65535, 8192)) == (8, 8192, 65535)
    assert chosen(needed(8192, 8192)) == (8, 8192, 8192)
    assert chosen(needed(5000, 4096)) == (8, 4096, 5000)
    assert chosen(0) == (8, 128, 128) and chosen(0, fixed_length=True) == (8, 8192, 8192)


def test_the_default_cache_of_a_card_is_what_is_free_less_a_tenth():
    config = small_config()
    token = cache_bytes(config, 1, 1, 2)

    def chosen(tokens, length, **settings):
        """With as many bytes free as ``tokens`` take beside a tenth of 1 GB, and the work of sequences of ``length``."""
        work = sum(size for name, size in card_memory(config, "bfloat16", 8, length).items()
                   if name not in ("weights", "key-value cache"))
        return tuple(plan_card_cache(config, "bfloat16", 8, 8192, 10 ** 9, 10 ** 8 + work + tokens * token, **settings))
    assert chosen(70000, 8192) == (8, 8192, 65536)
    assert chosen(65535, 8192) == (8, 8192, 65535)
    assert chosen(5000, 4096) == (8, 4096, 5000)
    with pytest.raises(InputError, match=r"^the card has 4\.5 GB free beside the weights, of which 0.1 GB are kept, and answering 8 "
                                         "sequences of 8192 tokens works in .* GB: too little for one of them; lower"):
        chosen(8191, 8192, fixed_length=True)


def test_a_cache_of_a_given_size():
    """A token of this model takes 1,024 bytes: keys and values of two layers, two heads of 16, in four bytes each."""
    config = small_config()
    assert cache_bytes(config, 1, 1, 4) == 2 * config.n_layer * config.num_key_value_heads * config.head_dim * 4
    token = cache_bytes(config, 1, 1, 4)
    plan = plan_cache(config, "float32", 4, 8192, 0, "1MB")
    assert plan == (4, 10 ** 6 // token, 10 ** 6 // token)
    assert plan_cache(config, "float32", 4, 300, 0, "1MB", processes=2) == (4, 300, 2 * 10 ** 6 // token)
    assert CachePlan(4, 300, 1000).blocks(16) == 63 and CachePlan(4, 300, 300).blocks(128) == 3
    held = 10 ** 6 // token
    with pytest.raises(InputError, match=f"^--cache_memory 1MB holds {held} tokens, and a sequence of {held + 1} takes 0.001 GB: "
                                         f"give at least that, or lower --max_length {held + 1}$"):
        plan_cache(config, "float32", 4, held + 1, 0, "1MB", fixed_length=True)
    with pytest.raises(InputError, match="^--cache_memory 0.01MB holds .* tokens, and a sequence of 128 takes .* GB: give at least "
                                         "that$"):
        plan_cache(config, "float32", 4, 8192, 0, "0.01MB")
    with pytest.raises(InputError, match="^--cache_memory 4 is not a size such as 64GB, 60GiB or 500MB$"):
        plan_cache(config, "float32", 4, 8192, 0, "4")


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(monkeypatch, capsys):
    config, shape = small_config(), dict(prompt=64, slots=2, length=64)
    need = sum(inference_memory(config, "float32", **shape).values())
    monkeypatch.setattr(memory, "available_bytes", lambda: need)
    check_inference_memory(config, "float32", "lower --max_length", **shape)
    monkeypatch.setattr(memory, "available_bytes", lambda: need - 1)
    with pytest.raises(InputError, match=r"^the model needs about 0\.6\d* GB of memory \(framework 0\.6.*\), and 0\.6\d* GB "
                                         "are available: lower --max_length, or give --ignore_memory"):
        check_inference_memory(config, "float32", "lower --max_length", **shape)
    check_inference_memory(config, "float32", "lower --max_length", ignore=True, **shape)
    assert "--ignore_memory" in capsys.readouterr().err


@pytest.mark.parametrize("words, count, local", [([], 1, 1), (["msrun", "--worker_num=16", "--local_worker_num=8"], 16, 8),
                                                 (["msrun", "--worker_num", "4", "--local_worker_num", "4"], 4, 4)])
def test_processes_of_other_machines_take_no_memory_here(words, count, local, monkeypatch):
    monkeypatch.setattr(rendezvous, "process_count", lambda: count)
    monkeypatch.setattr(rendezvous, "msrun_command", lambda: words)
    assert rendezvous.local_process_count() == local
