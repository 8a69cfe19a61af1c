"""Sampling: the official distributions, draws that follow them, and seeds that repeat."""

import numpy as np
import pytest
from scipy.stats import chisquare

from telechat import InputError, SamplingParams
from telechat.generation.sampling import Sampler, distribution, token_logprobs


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "reference" / "sampling.npz")


def settings(golden, number, **more):
    temperature, top_k, top_p, penalty = golden[f"params_{number}"]
    return SamplingParams(1, float(temperature), int(top_k), float(top_p), float(penalty), **more)


def dense(ids, probabilities, size):
    result = np.zeros(size)
    result[ids] = probabilities
    return result


@pytest.mark.parametrize("number", range(4))
def test_official_distributions(golden, number):
    for logits, previous, expected in zip(golden["logits"], golden["previous_ids"], golden[f"probs_{number}"]):
        ids, probabilities = distribution(logits, previous, settings(golden, number))
        assert np.abs(dense(ids, probabilities, len(logits)) - expected).max() < 1e-6


@pytest.mark.parametrize("number", [1, 2])  # the other settings leave a single token
def test_draws_follow_the_official_distribution(golden, number):
    # The row whose distribution has the most tokens: one that leaves a single token has nothing to test.
    row = int((golden[f"probs_{number}"] > 0).sum(axis=1).argmax())
    logits, previous, expected = (golden[name][row] for name in ("logits", "previous_ids", f"probs_{number}"))
    expected = expected.astype(np.float64)
    sampler = Sampler(settings(golden, number, seed=11))
    counts = np.bincount([sampler(logits, previous) for _ in range(10_000)], minlength=len(logits))
    assert counts[expected == 0].sum() == 0
    # Rare tokens together, so that every expected count is large enough for the test.
    common = expected * 10_000 >= 10
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * 10_000
    keep = wanted > 0
    assert keep.sum() > 1
    assert chisquare(observed[keep], wanted[keep] * observed[keep].sum() / wanted[keep].sum()).pvalue > 1e-3


def test_a_seed_repeats_and_another_does_not(golden):
    logits, previous = golden["logits"][0], golden["previous_ids"][0]

    def draws(seed, index=0):
        sampler = Sampler(settings(golden, 1, seed=seed), index)
        return [sampler(logits, previous) for _ in range(50)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert draws(3) != draws(3, index=1), "equal prompts of one call get draws of their own"
    assert draws(None) != draws(None)


def test_temperature_zero_is_greedy_after_the_penalty():
    logits = np.array([1.0, 3.0, 2.9], np.float32)
    assert Sampler(SamplingParams(1))(logits, [1]) == 1
    assert Sampler(SamplingParams(1, repetition_penalty=1.1))(logits, [1]) == 2
    assert logits.tolist() == [1.0, 3.0, np.float32(2.9)], "the logits are left alone"


def test_a_temperature_close_to_zero_is_greedy_and_not_nan():
    ids, probabilities = distribution(np.array([1.0, 3.0, 2.9], np.float32), [], SamplingParams(1, temperature=1e-308))
    assert ids[0] == 1 and probabilities.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("presence, frequency", [(0.5, 0.25), (1.0, 1.0), (0.0, 0.25), (0.5, 0.0)])
def test_presence_and_frequency_penalties_count_the_answer_alone(presence, frequency):
    logits = np.array([1.0, 3.0, 2.0, 0.0], np.float32)
    params = SamplingParams(1, temperature=1.0, presence_penalty=presence, frequency_penalty=frequency)
    # The prompt holds tokens 1 and 3, the answer 2, 2, 0.
    ids, probabilities = distribution(logits, [1, 3, 2, 2, 0], params, prompt_length=2)
    wanted = np.exp(np.array([1.0 - presence - frequency, 3.0, 2.0 - presence - 2 * frequency, 0.0]))
    assert np.abs(dense(ids, probabilities, 4) - wanted / wanted.sum()).max() < 1e-6
    assert Sampler(SamplingParams(1, frequency_penalty=1.2), prompt_length=1)(logits, [1, 1, 2]) == 1
    assert Sampler(SamplingParams(1, frequency_penalty=1.2), prompt_length=0)(logits, [1, 1, 2]) == 0
    assert logits.tolist() == [1.0, 3.0, 2.0, 0.0], "the logits are left alone"


@pytest.mark.parametrize("fields, words", [
    (dict(presence_penalty=2.1), "presence_penalty"), (dict(frequency_penalty=float("inf")), "frequency_penalty"),
    (dict(max_new_tokens=0), "max_new_tokens"), (dict(temperature=-1), "temperature"), (dict(top_k=-1), "top_k"),
    (dict(top_p=0), "top_p"), (dict(top_p=1.1), "top_p"), (dict(repetition_penalty=0), "repetition_penalty"),
    (dict(seed=-1), "seed"), (dict(temperature=float("nan")), "temperature"), (dict(top_k=2.5), "top_k"),
])
def test_values_out_of_range_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        SamplingParams(**{"max_new_tokens": 1, **fields})


def test_excluded_ids_are_never_drawn():
    """Whatever their logits: greedy, sampled, with a top_k beyond what is left, with penalties."""
    logits = np.array([3.0, 1.0, 9.0, 2.0, 9.0], np.float32)
    for params in (SamplingParams(1, excluded_ids=(2, 4)), SamplingParams(1, 1.0, top_k=1, excluded_ids=(2, 4))):
        ids, probabilities = distribution(logits, [4, 4], params)
        assert ids.tolist() == [0] and probabilities.tolist() == [1.0]
    expected = np.exp([3.0, 2.0, 1.0]) / np.exp([3.0, 2.0, 1.0]).sum()
    for fields in ({}, dict(top_k=4), dict(top_p=1.0, repetition_penalty=2.0, presence_penalty=-2.0)):
        ids, probabilities = distribution(logits, [4, 2], SamplingParams(1, 1.0, excluded_ids=(2, 4), **fields), 1)
        assert ids.tolist() == [0, 3, 1]
        np.testing.assert_allclose(probabilities, expected, rtol=1e-6)
    assert logits.tolist() == [3.0, 1.0, 9.0, 2.0, 9.0], "left alone"
    draw = Sampler(SamplingParams(1, 2.0, seed=1, excluded_ids=(2, 4)))
    assert {draw(logits, [0]) for _ in range(200)} == {0, 1, 3}


def test_logprobs_are_those_of_all_logits():
    logits = np.random.default_rng(0).standard_normal(50).astype(np.float32) * 5
    likely = np.argsort(-logits)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    found = token_logprobs(logits, int(likely[7]), 3, excluded_ids=(int(likely[1]),))
    assert found.token == likely[7] and [index for index, _ in found.top] == likely[[0, 2, 3]].tolist()
    np.testing.assert_allclose([found.logprob, *[value for _, value in found.top]], exact[likely[[7, 0, 2, 3]]],
                               rtol=0, atol=1e-12)
    assert token_logprobs(logits, 3, 0).top == []
    assert [index for index, _ in token_logprobs(logits, 3, 99, range(10, 50)).top] == \
        [index for index in likely if index < 10]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(value, temperature):
    logits = np.zeros(5, np.float32)
    logits[2] = value
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        distribution(logits, [1], SamplingParams(1, temperature))
