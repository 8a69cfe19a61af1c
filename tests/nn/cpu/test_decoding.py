"""The decoding operator against the portable graphs: logits, slots, weights that are replaced, threads."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from telechat import TeleChat
from telechat.generation.engine import Engine
from telechat.nn.cpu.build import default_threads, load_library
from telechat.nn.cpu.kernels import CpuKernels
from tests.test_model import small_config

if load_library() is None:
    pytest.skip("needs a C++ compiler, which is not here", allow_module_level=True)

PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5], [8, 8]]
CONFIGS = {
    "grouped": dict(num_key_value_heads=2), "alibi": dict(position_embedding="alibi"),
    "multiplied": dict(input_mult=2.0, output_mult=0.5, tie_word_embeddings=False),
}


def engine_of(kernels, dtype="float32", **fields):
    model = TeleChat(small_config(initializer_range=0.3, **fields), dtype, kernels=kernels)
    engine = Engine(model, 64)
    engine.reserve(len(PROMPTS), 64)
    engine.prefill(range(len(PROMPTS)), PROMPTS)
    return engine


def decode(engine, slots=range(len(PROMPTS)), steps=3):
    """Logits of some steps with fixed tokens."""
    slots = list(slots)
    return np.stack([engine.decode(slots, [11 + step + slot for slot in slots], [len(PROMPTS[slot]) + step for slot in slots])
                     for step in range(steps)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CONFIGS)
def test_logits_are_those_of_portable_kernels(case, dtype):
    ours, theirs = (decode(engine_of(kernels, dtype, **CONFIGS[case])) for kernels in ("cpu", "portable"))
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_neighbours_and_threads_change_no_bit():
    together = decode(engine_of("cpu"))
    load_library().set_thread_count(3)
    for slots in ([2], [3, 0], [1, 2, 3]):
        np.testing.assert_array_equal(decode(engine_of("cpu"), slots), together[:, slots])
    load_library().set_thread_count(default_threads())


def test_a_parameter_may_be_given_another_tensor():
    """No address is kept: neither of a Parameter that is assigned to, nor of one whose tensor is another now."""
    engine = engine_of("cpu")
    before = decode(engine, steps=1)
    weight = engine.model.transformer.h[0].mlp.up_proj.weight
    old = weight.asnumpy().copy()
    weight.set_data(Tensor(old * 2))
    assert np.abs(decode(engine, steps=1) - before).max() > 1e-3
    weight.assign_value(Tensor(old))
    np.testing.assert_array_equal(decode(engine, steps=1), before)
    engine.model.transformer.h[0].mlp.up_proj.weight = ms.Parameter(Tensor(old * 2))
    assert np.abs(decode(engine, steps=1) - before).max() > 1e-3


def test_several_tokens_of_a_sequence_get_what_each_gets_alone():
    """Also where other tokens were there before: a guess that was wrong leaves nothing behind."""
    one, together = engine_of("cpu"), engine_of("cpu")
    expected = [decode(one, [slot], 3)[:, 0] for slot in (2, 0)]
    together.extend([2, 0], [[60, 61], [62, 63, 64]], [5, 3])
    guesses = [[11 + step + slot for step in range(3)] for slot in (2, 0)]
    for found, wanted in zip(together.extend([2, 0], guesses, [5, 3]), expected):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("case", ["grouped", "alibi"])
def test_graphs_give_the_same_where_a_model_is_cut_over_several_hosts(case, monkeypatch):
    """There no operator computes the whole: prompts, in one go and in two parts, and new tokens go through graphs."""
    def logits():
        engine, prompt = engine_of("cpu", **CONFIGS[case]), [3, 1, 4, 1, 5, 9]
        new = decode(engine, steps=1)
        engine.end(1)
        engine.begin(1, prompt)
        engine.grow(1, len(prompt))
        engine.prefill([1], [prompt[:4]], [0])
        return [*new, engine.prefill([1], [prompt[4:]], [4])]

    expected = logits()
    monkeypatch.setattr(CpuKernels, "decode_step", lambda *arguments: None)
    for found, wanted in zip(logits(), expected):
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
