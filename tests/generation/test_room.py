"""Bytes of weights and cache against those of a real model and engine, and what is refused."""

import pytest

from telechat import InputError, TeleChat
from telechat.generation.engine import Engine
from telechat.generation.room import available_bytes, cache_bytes, check_room, weight_bytes
from tests.test_model import small_config


def test_bytes_are_those_of_the_tensors():
    config = small_config()
    model = TeleChat(config)
    engine = Engine(model, 64)
    engine.reserve(3, 64)
    assert cache_bytes(config, 3, 64, 4) == sum(cache.nbytes for layer in range(config.n_layer) for cache in engine._caches_of(layer)[2:])
    assert cache_bytes(config, 3, 64, 4, processes=2) * 2 == cache_bytes(config, 3, 64, 4)
    assert weight_bytes(config, 4) == sum(parameter.nbytes for parameter in model.get_parameters())


def test_what_is_more_than_the_free_memory_is_refused():
    config = small_config()
    need = weight_bytes(config, 4) + cache_bytes(config, 8, 1024, 4)
    check_room(config, 8, 1024, "float32", 1, need)
    check_room(config, 8, 1024, "float32", 1, None)
    check_room(config, 8, 1024, "bfloat16", 1, need - weight_bytes(config, 2))
    with pytest.raises(InputError, match="--max_batch 8 sequences of --max_length 1024 tokens.*lower"):
        check_room(config, 8, 1024, "float32", 1, need - 1)


def test_free_memory_is_the_systems_or_the_containers(tmp_path):
    meminfo, limit, used = (tmp_path / name for name in ("meminfo", "max", "current"))
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:  5000 kB\n")
    groups = [(limit, used), (tmp_path / "none", tmp_path / "none")]
    assert available_bytes(meminfo, groups) == 5000 * 1024
    used.write_text("1000\n")
    for text, free in (("max\n", 5000 * 1024), ("31000\n", 30_000), ("900\n", 0)):
        limit.write_text(text)
        assert available_bytes(meminfo, groups) == free
    assert available_bytes(tmp_path / "absent", groups) is None
