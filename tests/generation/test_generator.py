"""Generation through the KV cache: the official greedy tokens, batches, and lengths that differ."""

import dataclasses

import numpy as np
import pytest

from telechat import Generator, InputError, SamplingParams, TeleChat
from telechat.generation import engine, graph_steps
from tests.test_model import small_config


def greedy_without_cache(model, prompt, count):
    """The whole sequence computed anew for each token, filled up behind to one length (attention is causal)."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        filled = ids + [0] * (48 - len(ids))
        ids.append(int(model([filled]).asnumpy()[0, len(ids) - 1].argmax()))
    return ids[len(prompt):]


def test_official_greedy_tokens(reference):
    golden = reference.golden
    prompts = golden["prompt_ids"].tolist()
    count = golden["greedy_ids"].shape[1] - len(prompts[0])
    plain = SamplingParams(count)
    penalised = SamplingParams(count, repetition_penalty=float(golden["repetition_penalty"]))
    generator = Generator(reference.model(), max_length=64, batch_size=2)
    for params, key in ((plain, "greedy_ids"), (penalised, "greedy_penalty_ids")):
        expected = golden[key][:, len(prompts[0]):].tolist()
        assert generator.generate(prompts, params) == expected, "both in one batch"
        assert [generator.generate([prompt], params)[0] for prompt in prompts] == expected, "one at a time"
        assert [list(generator.stream(prompt, params)) for prompt in prompts] == expected, "streamed"


def test_different_lengths_in_one_batch_equal_each_alone(reference):
    golden = reference.golden
    first, second = golden["prompt_ids"].tolist()
    # More prompts than slots: a freed slot takes the next while the other goes on.
    prompts = [first[:3], second, first[2:8], second[:1], first + second[::-1] + first]
    model = reference.model()
    together = Generator(model, max_length=64, batch_size=2).generate(prompts, SamplingParams(12))
    alone = Generator(model, max_length=64)
    assert together == [alone.generate([prompt], SamplingParams(12))[0] for prompt in prompts]
    assert together == [greedy_without_cache(model, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("fields", [
    dict(position_embedding="alibi"), dict(num_key_value_heads=2), dict(tie_word_embeddings=True, input_mult=3.0),
], ids=["alibi", "grouped heads", "tied and scaled"])
def test_variants_equal_the_model_without_cache(fields):
    model = TeleChat(small_config(initializer_range=0.3, **fields))
    prompts = [[5, 9, 3], [7, 1, 2, 8, 60, 11, 4]]
    answers = Generator(model, max_length=64, batch_size=2).generate(prompts, SamplingParams(30))
    assert answers == [greedy_without_cache(model, prompt, 30) for prompt in prompts]


def test_a_deep_model_decodes_by_calls_of_one_graph(monkeypatch):
    """Three layers in calls of two: as in one graph, and as without a cache."""
    model = TeleChat(small_config(initializer_range=0.3, n_layer=3))
    prompts = [[5, 9, 3], [7, 1, 2, 8, 60, 11, 4]]
    answers = Generator(model, max_length=64, batch_size=2).generate(prompts, SamplingParams(20))
    monkeypatch.setattr(graph_steps, "LAYERS_A_GRAPH", 2)
    assert Generator(model, max_length=64, batch_size=2).generate(prompts, SamplingParams(20)) == answers
    assert answers == [greedy_without_cache(model, prompt, 20) for prompt in prompts]


def test_generation_past_training_seqlen_uses_the_stretched_tables():
    """Prefill of a prompt beyond training_seqlen equals the whole model's logits, whose tables are stretched."""
    model = TeleChat(small_config(initializer_range=0.3, training_seqlen=16, rotary_ntk_context=16))
    prompt = np.random.default_rng(0).integers(0, 96, 40).tolist()
    first = Generator(model, max_length=64).generate([prompt], SamplingParams(1))[0]
    assert first == [int(model([prompt]).asnumpy()[0, -1].argmax())]
    unstretched = TeleChat(dataclasses.replace(model.config, training_seqlen=64, rotary_ntk_context=64),
                           tensors=lambda name, shape: dict((p.name, p) for p in model.get_parameters())[name].asnumpy())
    assert np.abs(unstretched([prompt]).asnumpy() - model([prompt]).asnumpy()).max() > 0.1


def test_prompts_of_one_call_have_tables_of_their_own(monkeypatch):
    """One prompt is past training_seqlen and has stretched tables, the others have not; slots equal each alone."""
    model = TeleChat(small_config(initializer_range=0.3, training_seqlen=16, rotary_ntk_context=16))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 96, length).tolist() for length in (5, 40, 16, 30)]
    calls, prefill = [], engine.Engine.prefill

    def counted(self, slots, prompts, starts=None):
        calls.append(len(prompts))
        return prefill(self, slots, prompts, starts)

    monkeypatch.setattr(engine.Engine, "prefill", counted)
    together = Generator(model, max_length=64, batch_size=3).generate(prompts, SamplingParams(6))
    assert calls == [3, 1], "as many as there are slots in one call, then what joins"
    monkeypatch.setattr(engine.Engine, "takes_together", lambda self, counts: False)
    assert Generator(model, max_length=64, batch_size=3).generate(prompts, SamplingParams(6)) == together
    assert calls[2:] == [1, 1, 1, 1]
    assert [answer[0] for answer in together] == [int(model([p]).asnumpy()[0, -1].argmax()) for p in prompts]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_weights(dtype):
    model = TeleChat(small_config(initializer_range=0.3), dtype)
    answer = Generator(model, max_length=64).generate([[5, 9, 3]], SamplingParams(12))[0]
    assert answer == greedy_without_cache(model, [5, 9, 3], 12)


def test_a_generator_leaves_the_parameters_names_alone():
    model = TeleChat(small_config())
    names = [parameter.name for parameter in model.get_parameters()]
    Generator(model, max_length=10).generate([[1]], SamplingParams(2))
    assert [parameter.name for parameter in model.get_parameters()] == names


def test_stop_tokens_end_an_answer_and_are_left_out(reference):
    golden = reference.golden
    prompts = golden["prompt_ids"].tolist()
    expected = golden["greedy_ids"][:, len(prompts[0]):].tolist()
    stop = expected[0][5]
    generator = Generator(reference.model(), max_length=64, batch_size=2)
    answers = generator.generate(prompts, SamplingParams(32, stop_ids=(stop,)))
    for answer, whole in zip(answers, expected):
        assert answer == (whole[:whole.index(stop)] if stop in whole else whole)


def test_sampling_repeats_with_a_seed_in_any_batch(reference):
    prompts = reference.golden["prompt_ids"].tolist()
    params = SamplingParams(16, temperature=1.0, top_p=0.9, seed=4)
    generator = Generator(reference.model(), max_length=64, batch_size=2)
    answers = generator.generate(prompts, params)
    assert answers == generator.generate(prompts, params)
    assert answers[0] == list(generator.stream(prompts[0], params))
    assert answers != generator.generate(prompts, dataclasses.replace(params, seed=5))


def test_max_length_bounds_the_sequence():
    model = TeleChat(small_config())
    generator = Generator(model, max_length=10)
    assert len(generator.generate([[1, 2, 3, 4]], SamplingParams(100))[0]) == 6
    assert generator.generate([], SamplingParams(1)) == []


@pytest.mark.parametrize("prompt, words", [
    ([], "at least one token"), (list(range(10)), "max_length 10"), ([1, 96], "token id 96"), ([-1], "token id -1"),
])
def test_wrong_prompts_are_refused(prompt, words):
    with pytest.raises(InputError, match=words):
        Generator(TeleChat(small_config()), max_length=10).generate([[1], prompt], SamplingParams(2))


@pytest.mark.parametrize("fields", [dict(max_length=0), dict(batch_size=0), dict(max_length=2.5)])
def test_wrong_sizes_are_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        Generator(TeleChat(small_config()), **fields)


def test_a_small_cache_changes_no_answer():
    """Four at a time, of up to 48 tokens each, on five blocks of 16."""
    model = TeleChat(small_config(initializer_range=0.3))
    prompts, params = [[7 + number, 9, 3] * 5 for number in range(6)], SamplingParams(33)
    generator = Generator(model, 64, batch_size=4, cache_tokens=64)
    answers = generator.generate(prompts, params)
    assert generator._engine.table.pool.count == 5 < 4 * 3
    assert answers == Generator(model, 64).generate(prompts, params)
