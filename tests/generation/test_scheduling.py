"""A cache that is too small for all, prompts in parts, and shared beginnings: every answer is what it is alone."""

import numpy as np
import pytest

from telechat import SamplingParams, TeleChat
from telechat.generation.batch import Batch
from telechat.generation.engine import Engine
from telechat.nn.cpu.build import load_library
from tests.serving.conftest import CountingEngine
from tests.test_model import small_config

LENGTH = 96
FIELDS = {"rotary": {}, "alibi": dict(position_embedding="alibi"), "grouped": dict(num_key_value_heads=2),
          "stretched": dict(training_seqlen=40, rotary_ntk_context=40)}


def run(batch, requests):
    """(token, log-probabilities) of each request's answer, and why it ended."""
    answers, ends = [[] for _ in requests], [None] * len(requests)
    for number, (prompt, params) in enumerate(requests):
        batch.add(number, prompt, params, number)
    while len(batch):
        for step in batch.prefill() + batch.decode():
            assert ends[step.key] is None and step.error is None
            answers[step.key] += [] if step.token is None else [(step.token, step.logprobs)]
            ends[step.key] = step.reason
    return answers, ends


def test_twenty_requests_on_three_blocks():
    """Prompts of 1 to 9 tokens and answers of 1 to 11 on a cache of 12: all are answered, none twice, in turn."""
    requests = [([30 + number] * (1 + number % 9), SamplingParams(1 + number * 7 % 11)) for number in range(20)]
    engine = CountingEngine(slots=8, length=32, blocks=3, block_size=4)
    assert engine.length == 12
    batch = Batch(engine)
    answers, ends = run(batch, requests)
    for number, (prompt, params) in enumerate(requests):
        count = min(params.max_new_tokens, 12 - len(prompt))
        assert [token for token, _ in answers[number]] == [(prompt[0] + 1 + place) % 64 for place in range(count)]
        assert ends[number] == "length"
    assert batch.preemptions >= 3 and engine.available == 3


def test_the_newest_makes_room_and_the_oldest_goes_on():
    engine = CountingEngine(slots=2, length=16, blocks=4, block_size=4, reuse=False)
    batch, seen = Batch(engine), {0: [], 1: []}
    batch.add(0, [1, 1, 1], SamplingParams(13))
    batch.add(1, [9] * 7, SamplingParams(9))
    order = []
    while len(batch):
        for step in batch.prefill() + batch.decode():
            seen[step.key].append(step.token)
            order.append(step.key)
    assert seen == {0: list(range(2, 15)), 1: list(range(10, 19))} and batch.preemptions == 1
    assert order.index(1) < 3, "both ran"
    last = len(order) - 1 - order[::-1].index(0)
    assert set(order[last + 1:]) == {1} and order[last - 3:last + 1].count(0) == 4, "the first one ended undisturbed"


def test_one_that_is_removed_while_it_waits_or_runs_gives_all_back():
    engine = CountingEngine(slots=2, length=16, blocks=4, block_size=4)
    batch = Batch(engine, chunk=4)
    for key in range(4):
        batch.add(key, [20 + key] * 9, SamplingParams(5))
    batch.prefill()
    for key in (0, 3, 1, 0):
        batch.remove(key)
    answers = []
    while len(batch):
        answers += [step.token for step in batch.prefill() + batch.decode() if step.key == 2]
    assert answers == [23, 24, 25, 26, 27] and engine.available == 4


def requests_of(config, rng):
    """Prompts of which some begin alike, greedy and sampled, with penalties and log-probabilities."""
    begin = rng.integers(0, config.vocab_size, 36).tolist()
    prompts = [begin[:33], begin + [5, 6], begin[:20] + [1], rng.integers(0, config.vocab_size, 50).tolist(), begin + [5, 7]]
    return [(prompt, SamplingParams(20 + 5 * number, temperature=float(number % 2), seed=number, logprobs=2,
                                    frequency_penalty=0.3 * (number == 3), repetition_penalty=1.0 + 0.2 * (number == 1)))
            for number, prompt in enumerate(prompts)]


@pytest.fixture(scope="module", params=FIELDS)
def case(request):
    """A model by the operators for CPUs, requests, and what each is answered alone by an engine that shares nothing."""
    if load_library() is None:
        pytest.skip("needs a C++ compiler, which is not here")
    model = TeleChat(small_config(initializer_range=0.3, **FIELDS[request.param]), kernels="cpu")
    requests = requests_of(model.config, np.random.default_rng(0))
    engine = Engine(model, LENGTH, reuse=False)
    engine.reserve(1, LENGTH)
    alone = []
    for number, one in enumerate(requests):
        batch, answer = Batch(engine), []
        batch.add(number, *one, number)
        while len(batch):
            answer += [(step.token, step.logprobs) for step in batch.prefill() + batch.decode()]
        alone.append(answer)
    return model, requests, alone


@pytest.mark.parametrize("blocks, chunk, reuse", [(7, None, False), (7, 8, True), (None, 5, False), (None, 24, True)])
def test_no_bit_depends_on_the_cache_or_on_chunks(case, blocks, chunk, reuse):
    """Tokens and log-probabilities, to the last bit; past the length up to which rotary tables are fixed, too."""
    model, requests, alone = case
    engine = Engine(model, LENGTH, reuse=reuse)
    engine.reserve(3, LENGTH, blocks)
    for again in range(2):
        batch = Batch(engine, chunk)
        assert run(batch, requests)[0] == alone
        assert (batch.preemptions > 0) == (blocks is not None)
        assert engine.available == engine.table.pool.count
    assert (engine.table.hits > 100) == reuse


def test_prompts_that_end_with_a_block_or_with_the_cache(case):
    """Of whole blocks, a token more or less, and with room for a single token; several answers to one prompt."""
    model, _, _ = case
    ids = np.random.default_rng(3).integers(0, 96, LENGTH).tolist()
    requests = [(ids[:count], SamplingParams(4, temperature=1.0, seed=8)) for count in (16, 16, 32, 33, 47, 48, LENGTH - 1)]
    alone, shared = Engine(model, LENGTH, reuse=False), Engine(model, LENGTH)
    alone.reserve(1, LENGTH)
    shared.reserve(4, LENGTH, 9)
    expected, ends = run(Batch(alone), requests)
    assert ends == ["length"] * len(requests) and [len(answer) for answer in expected] == [4] * 6 + [1]
    assert expected[0] != expected[1], "draws of their own"
    for chunk in (None, 16):
        assert run(Batch(shared, chunk), requests)[0] == expected
        assert shared.available == 9
    assert shared.table.hits > 0


def test_a_conversation_computes_what_is_new(case):
    """Each turn's prompt is the last one's, its answer and a question: all but the answer's last token is there."""
    model, _, _ = case
    with_it, without = Engine(model, LENGTH), Engine(model, LENGTH, reuse=False)
    for engine in (with_it, without):
        engine.reserve(1, LENGTH)
    prompt = [7, 8, 9]
    for turn in range(6):
        misses = with_it.table.misses
        (answer, _), (expected, _) = (
            (lambda made: (made[0][0], made[1]))(run(Batch(engine), [(prompt, SamplingParams(9, logprobs=1))]))
            for engine in (with_it, without))
        assert answer == expected
        if len(prompt) <= 40:  # with stretched tables nothing of a shorter prompt is right
            assert with_it.table.misses - misses == 3 + (turn > 0)
        prompt = prompt + [token for token, _ in answer] + [3, 4, 5]


def test_sixteen_requests_with_one_system_text():
    """At once or one after another, an eighth of the tokens is computed, and the answers are the same."""
    model = TeleChat(small_config(initializer_range=0.3, training_seqlen=1024))
    rng = np.random.default_rng(1)
    system = rng.integers(0, 96, 512).tolist()
    requests = [(system + rng.integers(0, 96, 8 + number % 3).tolist(), SamplingParams(2)) for number in range(16)]
    total, answers = sum(len(prompt) for prompt, _ in requests), []
    for slots, chunk, reuse in ((16, 512, False), (16, 512, True), (1, None, True)):
        engine = Engine(model, 560, reuse)
        engine.reserve(slots, 560)
        answers.append(run(Batch(engine, chunk), requests)[0])
        assert engine.table.misses == total if not reuse else engine.table.misses <= total / 8
    assert answers[1] == answers[0] and answers[2] == answers[0]


def test_portable_kernels_read_a_prompt_in_parts_as_whole():
    """Logits within 1e-5 of the largest, also with a beginning that another sequence computed while it answered."""
    for fields in (FIELDS["alibi"], {**FIELDS["grouped"], **FIELDS["stretched"]}):
        model = TeleChat(small_config(initializer_range=0.3, **fields), kernels="portable")
        prompt = np.random.default_rng(0).integers(0, 96, 75).tolist()
        engine = Engine(model, LENGTH)
        engine.reserve(2, LENGTH)
        whole = engine.prefill([0], [prompt])[0]
        engine.begin(1, prompt)
        assert engine.grow(1, len(prompt))
        for start, end in ((0, 30), (30, 60), (60, 75)):
            logits = engine.prefill([1], [prompt[start:end]], [start])[0]
        assert np.abs(logits - whole).max() <= 1e-5 * np.abs(whole).max()
    requests = [(prompt, SamplingParams(20)) for prompt, _ in requests_of(model.config, np.random.default_rng(2))[:3]]
    answers = []
    for blocks in (7, None):
        engine.reserve(3, LENGTH, blocks)
        batch = Batch(engine, 32)
        answers.append([[token for token, _ in answer] for answer in run(batch, requests)[0]])
        assert (batch.preemptions > 0) == (blocks is not None)
    assert answers[0] == answers[1]
