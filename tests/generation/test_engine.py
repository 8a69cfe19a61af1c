"""How many graphs decoding compiles: as many for a deep model as for one of a few layers."""

import pytest

from telechat import TeleChat
from telechat.generation.engine import BLOCK_TENSORS, Engine
from telechat.nn.kernels import Kernels
from tests.test_model import small_config


@pytest.mark.parametrize("layers, paged, calls", [
    (8, False, []), (8, True, [8]), (2, True, [2]), (19, False, [8, 8, 3]), (19, True, [8, 8, 3]),
])
def test_calls_of_a_step(monkeypatch, layers, paged, calls):
    """No call: the whole model in one graph. A graph is compiled for each number of layers that a call has."""
    monkeypatch.setattr(Kernels, "require_device", lambda kernels: None)
    model = TeleChat(small_config(n_layer=layers))
    model.set_kernels(Kernels(paged=paged))
    engine = Engine(model, 64)
    engine.reserve(1, 64)
    assert [len(tensors) / BLOCK_TENSORS for tensors in engine._groups] == calls
    caches = [tensor for tensors in engine._groups for first in range(0, len(tensors), BLOCK_TENSORS)
              for tensor in tensors[first:first + 4]]
    if calls:
        # Each cache once to be written and once to be read, in the order of the layers.
        assert all(one is other for one, other in zip(caches, engine._caches)) and len(caches) == len(engine._caches)


def test_a_view_is_the_memory_of_what_is_read():
    engine = Engine(TeleChat(small_config()), 64)
    engine.reserve(2, 64)
    for layer in range(engine.model.config.n_layer):
        caches = engine._caches_of(layer)
        for view, cache in zip(caches[:2], caches[2:]):
            assert view.data_ptr() == cache.data_ptr() and view.size == cache.size
