"""Sequences with LoRA adapters in one batch: each gets what the model gives that its adapter is merged into."""

import functools

import numpy as np
import pytest

from telechat import SamplingParams, TeleChat
from telechat.adapters.peft import Adapter
from telechat.checkpoint.convert import merge_lora
from telechat.generation import graph_steps
from telechat.generation.batch import Batch
from telechat.generation.engine import Engine
from telechat.parallel.inference import adapters_beside
from telechat.parallel.mesh import Group
from tests.adapter_files import write_adapter
from tests.conftest import save_small_model

NAMES = ("one", "two")
KINDS = ("cpu", "portable")
ALONE = Group(None, (0,), 0, 1)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base model, two adapters of different ranks and targets, and the models that they are merged into."""
    folder = tmp_path_factory.mktemp("adapters")
    save_small_model(folder / "base", use_bias=True)
    config = TeleChat.from_pretrained(folder / "base").config
    write_adapter(folder / "one", config, 3, seed=1, size=0.3)
    write_adapter(folder / "two", config, 5, ["self_attention.query", "mlp.down_proj"], seed=2, size=0.3, layers=(1,))
    for name in NAMES:
        merge_lora(folder / "base", folder / name, folder / f"merged-{name}")
    return folder


def engine_of(places, kernels):
    model = TeleChat.from_pretrained(places / "base", kernels=kernels)
    adapters = {name: Adapter(places / name, model.config) for name in NAMES}
    return Engine(model, 256, adapters=adapters_beside(model, adapters, ALONE))


@pytest.fixture(scope="module")
def merged(places):
    """merged(adapter): an engine for one sequence of the model that an adapter is merged into, or of the base."""
    @functools.cache
    def make(adapter):
        model = TeleChat.from_pretrained(places / (f"merged-{adapter}" if adapter else "base"), kernels="cpu")
        engine = Engine(model, 2048, reuse=False)
        engine.reserve(1, 1200)
        return engine
    return make


def logits_of(engine, slots, prompts, adapters):
    for slot, prompt, adapter in zip(slots, prompts, adapters):
        engine.begin(slot, prompt, adapter=adapter)
        assert engine.grow(slot, len(prompt) + 1)
    first = engine.prefill(slots, prompts, [0] * len(slots))
    return np.stack([first, engine.decode(slots, first.argmax(-1).tolist(), [len(prompt) for prompt in prompts])])


@pytest.mark.parametrize("kernels", KINDS)
def test_unmerged_logits_are_the_merged_models(places, merged, kernels):
    """Prompt and next token, rows of both adapters and of none in one call: 1e-5 of the largest."""
    engine = engine_of(places, kernels)
    engine.reserve(3, 128)
    random = np.random.default_rng(0)
    prompts, adapters = [random.integers(3, 1600, length).tolist() for length in (9, 31, 14)], ["one", None, "two"]
    found = logits_of(engine, [0, 1, 2], prompts, adapters)
    for row, adapter in enumerate(adapters):
        expected = logits_of(merged(adapter), [0], [prompts[row]], [None])[:, 0]
        assert np.abs(found[:, row] - expected).max() < 1e-5 * np.abs(expected).max()


def answers(engine, requests, length=12):
    """The tokens of all requests (prompt, adapter) in one batch."""
    batch, tokens = Batch(engine), {}
    for key, (prompt, adapter) in enumerate(requests):
        batch.add(key, prompt, SamplingParams(max_new_tokens=length), 0, adapter)
        tokens[key] = []
    while len(batch):
        for step in batch.prefill() + batch.decode():
            tokens[step.key] += [step.token]
    return list(tokens.values())


@pytest.mark.parametrize("kernels", KINDS)
def test_in_one_batch_each_gets_the_tokens_it_gets_alone(places, merged, kernels):
    """More requests than slots, prompts that begin alike: what the cache holds of one adapter serves no other."""
    engine = engine_of(places, kernels)
    engine.reserve(3, 128)
    shared = np.random.default_rng(1).integers(3, 1600, 40).tolist()
    requests = [(shared + [5 + number % 2], adapter)
                for number, adapter in enumerate(["one", None, "two", "one", "two", None, "one"])]
    together = answers(engine, requests)
    assert len({tuple(answer) for answer in together}) > 3
    for (prompt, adapter), found in zip(requests, together):
        assert answers(merged(adapter), [(prompt, None)])[0] == found


def test_a_row_without_adapter_has_the_same_bits_beside_rows_with_one(places, merged):
    """By the operator for CPUs."""
    engine = engine_of(places, "cpu")
    engine.reserve(2, 64)
    prompt = list(range(5, 25))
    found = logits_of(engine, [0, 1], [prompt, prompt], [None, "one"])
    assert np.array_equal(found[:, 0], logits_of(merged(None), [0], [prompt], [None])[:, 0])
    assert np.abs(found[:, 0] - found[:, 1]).max() > 0.01


def test_a_long_prompt_with_an_adapter_goes_in_parts(places, merged, monkeypatch):
    """By graphs, where whole long prompts take a path of their own."""
    monkeypatch.setattr(graph_steps, "ROWS_TOGETHER", 32)
    engine = engine_of(places, "portable")
    prompt = np.random.default_rng(2).integers(3, 1600, 75).tolist()
    engine.reserve(1, 128)
    expected = logits_of(merged("one"), [0], [prompt], [None])
    assert np.abs(logits_of(engine, [0], [prompt], ["one"]) - expected).max() < 1e-5 * np.abs(expected).max()
