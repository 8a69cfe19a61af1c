"""How many graphs decoding compiles, and for which batch sizes."""

import contextlib

import numpy as np
import pytest

from telechat import TeleChat
from telechat.generation.engine import Engine
from telechat.generation.graphs import BLOCK_TENSORS
from telechat.nn.kernels import Kernels
from tests.test_model import small_config


@pytest.mark.parametrize("layers, calls", [(8, []), (19, [8, 8, 3])])
def test_calls_of_a_step(layers, calls):
    """No call: the whole model in one graph. A graph is compiled for each number of layers that a call has."""
    model = TeleChat(small_config(n_layer=layers))
    model.set_kernels(Kernels())
    engine = Engine(model, 64)
    engine.reserve(1, 64)
    groups, layers = engine._steps._groups, engine._cache.layers
    assert [len(tensors) / BLOCK_TENSORS for tensors in groups] == calls
    caches = [tensor for tensors in groups for first in range(0, len(tensors), BLOCK_TENSORS)
              for tensor in tensors[first:first + 4]]
    if calls:
        # Each cache once to be written and once to be read, in the order of the layers.
        held = [tensor for layer in layers for tensor in layer]
        assert all(one is other for one, other in zip(caches, held)) and len(caches) == len(held)


def test_a_view_is_the_memory_of_what_is_read():
    engine = Engine(TeleChat(small_config()), 64)
    engine.reserve(2, 64)
    for caches in engine._cache.layers:
        for view, cache in zip(caches[:2], caches[2:]):
            assert view.data_ptr() == cache.data_ptr() and view.size == cache.size


def test_running_slots_are_computed_alone(monkeypatch):
    """Any slots in any order, in the next power of two: the logits that all slots together give."""
    engine = Engine(TeleChat(small_config(initializer_range=0.3, num_key_value_heads=2), kernels="portable"), 64)
    engine.reserve(6, 64)
    assert engine._steps.batch_sizes == engine.uncompiled == [1, 2, 4, 6]
    prompts = [[5 + slot, 9, 3][:1 + slot % 3] for slot in range(6)]
    engine.prefill(range(6), prompts)
    steps = engine._steps
    sizes, compute = [], steps._decode_rows
    monkeypatch.setattr(steps, "_decode_rows", lambda tokens, *rest: sizes.append(len(tokens)) or compute(tokens, *rest))
    monkeypatch.setattr("telechat.generation.graph_steps.BYTES_A_COMPILATION", 0)
    together = engine.decode(range(6), [7] * 6, [len(prompt) for prompt in prompts])
    for slots in ([4], [5, 0], [3, 1, 2], [2, 5, 1, 4]):
        logits = engine.decode(slots, [7] * len(slots), [len(prompts[slot]) for slot in slots])
        np.testing.assert_allclose(logits, together[slots], rtol=0, atol=1e-5)
    assert sizes == [6, 1, 2, 4, 4] and engine.uncompiled == []


def test_a_batch_of_more_slots_than_blocks_is_compiled(monkeypatch):
    engine = Engine(TeleChat(small_config(), kernels="portable"), 64)
    engine.reserve(6, 64, 3)
    batches = []
    monkeypatch.setattr(engine._steps, "decode", lambda slots, *rest: batches.append(slots))
    engine.compile(6)
    assert batches == [[0, 0, 1, 1, 2, 2]] and engine.available == 3


def test_a_smaller_batch_is_compiled_when_it_is_worth_it(monkeypatch):
    announced = []
    monkeypatch.setattr("telechat.generation.graph_steps.Progress",
                        lambda what: announced.append(what) or contextlib.nullcontext())
    engine = Engine(TeleChat(small_config(), kernels="portable"), 64)
    engine.reserve(4, 64)
    monkeypatch.setattr(engine._steps, "_decode_rows", lambda tokens, *rest: np.zeros((len(tokens), 3)))
    monkeypatch.setattr("telechat.generation.graph_steps.BYTES_A_COMPILATION", 2.5 * engine._steps._weight_bytes)
    assert engine.uncompiled == [1, 2, 4]
    engine.decode([1, 0, 2], [7] * 3, [1] * 3)
    assert engine.uncompiled == [1, 2]
    left = []
    for slot in (0, 1, 2, 0):
        assert engine.decode([slot], [7], [1]).shape == (1, 3)
        left.append(engine.uncompiled)
    assert left == [[1, 2], [1, 2], [2], [2]], "the third time"
    assert announced == ["compiling the next tokens' graph"] * 2, "for the sizes 4 and 1"


def test_prompts_go_together_where_they_are_short():
    """Up to 1,024 rows, each prompt filled up to 32 tokens times a power of two."""
    engine = Engine(TeleChat(small_config(), kernels="portable"), 512)
    engine.reserve(1, 512)
    for counts, together in (([32] * 32, True), ([1] * 33, False), ([3, 100] * 4, True), ([3, 100] * 4 + [1], False),
                             ([400, 2], True), ([257, 2, 2], False)):
        assert engine.takes_together(counts) == together, counts


def test_several_tokens_of_a_sequence_by_graphs():
    """Each sees those before it: the logits of one after another."""
    model = TeleChat(small_config(initializer_range=0.3, position_embedding="alibi"), kernels="portable")
    engine = Engine(model, 64)
    engine.reserve(2, 64)
    engine.prefill([0, 1], [[5, 9, 3], [7]])
    found = engine.extend([1, 0], [[8, 2], [4]], [1, 3])
    expected = [[engine.decode([1], [8], [1])[0], engine.decode([1], [2], [2])[0]], [engine.decode([0], [4], [3])[0]]]
    for rows, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(rows, np.stack(wanted), rtol=0, atol=1e-5)
