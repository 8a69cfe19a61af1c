"""Tokens guessed ahead: the answers without it, in fewer steps, and the very distribution they are drawn from."""

import itertools

import numpy as np
import pytest
from scipy import stats

from telechat import Generator, InputError, SamplingParams, TeleChat
from telechat.generation.batch import Batch
from telechat.generation.engine import Engine
from telechat.generation.prompt_lookup import LONGEST_PAUSE, PromptLookup
from telechat.generation.sampling import distribution
from telechat.nn.cpu.build import load_library
from tests.generation.test_scheduling import run
from tests.serving.conftest import CountingEngine
from tests.test_model import small_config


def test_what_is_guessed():
    lookup = PromptLookup(4)
    assert lookup.guess([1, 2, 3, 9, 8, 7, 2, 3], 10) == [9, 8, 7, 2], "two tokens stood before"
    assert lookup.guess([1, 2, 3, 9, 8, 7, 2, 3, 5, 1, 2, 3], 2) == [9, 8], "three go before two; as many as there is room for"
    assert PromptLookup(4).guess([1, 2, 3, 4], 10) == [] == PromptLookup(4).guess([1], 10)
    assert PromptLookup(5).guess([7, 1, 2, 1, 2], 10) == [1, 2, 1, 2, 1], "what repeats itself goes on"
    ids = [1, 2, 3, 1, 2, 4, 1, 2]
    assert PromptLookup(1).guess(ids, 10) == [4], "the newest place counts"
    lookup = PromptLookup(1)
    for known in range(1, len(ids)):
        lookup.guess(ids[:known], 10)
    assert lookup.guess(ids, 10) == [4]


def test_wrong_guesses_become_rare():
    lookup, guesses = PromptLookup(2), []
    for step in range(1000):
        guesses.append(bool(lookup.guess([1, 2, 3, 1, 2], 9)))
        if guesses[-1]:
            lookup.judge(0)
    places = np.flatnonzero(guesses)
    assert np.diff(places).tolist()[:7] == [3, 5, 9, 17, 33, 65, 65] and max(np.diff(places)) == LONGEST_PAUSE + 1
    while not lookup.guess([1, 2, 3, 1, 2], 9):
        pass
    lookup.judge(1)
    assert lookup.guess([1, 2, 3, 1, 2], 9), "one that was right ends that"


class Repeats(CountingEngine):
    """Counts to 8 and begins again."""

    def _logits(self, token):
        return super()._logits(token % 8)


def test_fewer_steps_and_the_same_tokens():
    """Also where an answer stops in the middle of what was guessed, by a token or for want of room."""
    requests = [(list(range(1, 9)) * 2, SamplingParams(13)), ([3, 4, 5, 3, 4], SamplingParams(30, stop_ids=(7,))),
                (list(range(1, 9)) * 2, SamplingParams(40))]
    steps = {}
    for speculate in (0, 4):
        engine = Repeats(slots=3, length=40)
        batch = Batch(engine, speculate=speculate)
        answers, ends = run(batch, requests)
        assert [len(answer) for answer in answers] == [13, 2, 24] and ends == ["length", "stop", "length"]
        assert [token for token, _ in answers[2]] == (list(range(1, 9)) * 3)
        steps[speculate] = engine.decodes
    assert steps[0] == 24 and steps[4] <= 6
    assert batch.guessed >= batch.right >= 13 + 24 - 2 * 6


def test_no_block_is_taken_from_others_for_a_guess():
    """On a cache that is too small for all, guesses put nobody back who would not have had to go."""
    requests = [(list(range(1, 9)), SamplingParams(24)) for _ in range(3)]
    put_back = []
    for speculate in (0, 4):
        batch = Batch(Repeats(slots=3, length=32, blocks=20, reuse=False), speculate=speculate)
        answers, _ = run(batch, requests)
        assert [[token for token, _ in answer] for answer in answers] == [list(range(1, 9)) * 3] * 3
        put_back.append(batch.preemptions)
    assert put_back[1] <= put_back[0]


def test_official_greedy_tokens(reference):
    """With a prompt that quotes the answer, so that guesses are right; with and without repetition penalty."""
    golden, model = reference.golden, reference.model()
    prompts = golden["prompt_ids"].tolist()
    count = golden["greedy_ids"].shape[1] - len(prompts[0])
    generator = Generator(model, max_length=128, batch_size=2, speculate=4)
    for params, key in ((SamplingParams(count), "greedy_ids"),
                        (SamplingParams(count, repetition_penalty=float(golden["repetition_penalty"])), "greedy_penalty_ids")):
        assert generator.generate(prompts, params) == golden[key][:, len(prompts[0]):].tolist()
    quoting = golden["greedy_ids"][0].tolist() * 2 + prompts[0]
    assert generator.generate([quoting], SamplingParams(24)) == Generator(model, max_length=128).generate(
        [quoting], SamplingParams(24))


@pytest.mark.parametrize("kernels", ["cpu", "portable"])
def test_sampled_answers_are_the_same(kernels):
    """Drawn with seeds, penalties and log-probabilities; by the operators for CPUs to the last bit."""
    if kernels == "cpu" and load_library() is None:
        pytest.skip("needs a C++ compiler, which is not here")
    model = TeleChat(small_config(vocab_size=8, initializer_range=0.3), kernels=kernels)
    rng, slots, chunk = np.random.default_rng(0), *((2, 16) if kernels == "cpu" else (1, None))
    requests = []
    for number in range(4):
        prompt = prompt if number == 1 else rng.integers(0, 8, 24).tolist()  # two answers to one
        requests.append((prompt, SamplingParams(30, temperature=0.7, seed=number // 2, logprobs=1, top_p=0.9,
                                                frequency_penalty=-0.1 * (number % 2), presence_penalty=0.2)))
    engine, found, batches = Engine(model, 64, guesses=3), [], []
    engine.reserve(slots, 64)
    for speculate in (0, 3):
        batches.append(Batch(engine, chunk, speculate))
        found.append(run(batches[-1], requests)[0])
        assert engine.available == engine.table.pool.count
    assert batches[1].right > 15 and batches[1].guessed > batches[1].right
    assert [[token for token, _ in answer] for answer in found[1]] == [[token for token, _ in answer] for answer in found[0]]
    if kernels == "cpu":
        assert found[1] == found[0]


def test_the_distribution_of_ten_thousand_draws():
    """Chi-square of answers of four tokens, drawn behind a prompt that guesses what follows each first one."""
    model = TeleChat(small_config(vocab_size=4, initializer_range=0.1), seed=3)
    prompt, settings = [2, 0, 1, 1, 2, 1, 0, 2, 2, 3, 3, 2, 3, 1, 2], dict(temperature=1.0)
    exact = {}
    every = list(itertools.product(range(4), repeat=4))
    for answer, logits in zip(every, model([prompt + list(answer) for answer in every]).asnumpy()[:, len(prompt) - 1:]):
        chance = 1.0
        for place, token in enumerate(answer):
            ids, probabilities = distribution(logits[place], prompt, SamplingParams(1, **settings))
            chance *= dict(zip(ids.tolist(), probabilities))[token]
        exact[answer] = chance
    draws, counts = 10_000, dict.fromkeys(exact, 0)
    engine = Engine(model, 32, guesses=2)
    engine.reserve(100, 32)
    batch = Batch(engine, speculate=2)
    answers, _ = run(batch, [(prompt, SamplingParams(4, seed=11, **settings))] * draws)
    for answer in answers:
        counts[tuple(token for token, _ in answer)] += 1
    assert batch.guessed > draws and draws / 10 < batch.right < batch.guessed
    often = [answer for answer in exact if draws * exact[answer] >= 5]
    observed = [*(counts[answer] for answer in often), draws - sum(counts[answer] for answer in often)]
    expected = [*(draws * exact[answer] for answer in often), draws - sum(draws * exact[answer] for answer in often)]
    assert len(often) > 100
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("speculate", [-1, 65, 1.5, True])
def test_what_cannot_be_guessed(speculate):
    with pytest.raises(InputError, match=f"speculate must be a whole number .*, not {speculate}"):
        Generator(None, speculate=speculate)
