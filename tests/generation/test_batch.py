"""One sequence that fails among eight: it ends with an error of its own, the others get what they get alone."""

import numpy as np
import pytest

from telechat import Generator, SamplingParams, TeleChat
from telechat.generation import sampling
from telechat.generation.batch import Batch
from tests.serving.conftest import CountingEngine
from tests.test_model import small_config

PROMPTS = [[10 * number] for number in range(8)]


def run(engine, params):
    """Tokens, reason and error of each prompt."""
    batch, answers = Batch(engine), [[] for _ in PROMPTS]
    ends = {}
    for number, prompt in enumerate(PROMPTS):
        batch.add(number, prompt, params, number)
    while len(batch):
        for step in batch.prefill() + batch.decode():
            answers[step.key] += [] if step.token is None else [step.token]
            if step.reason:
                ends[step.key] = step.reason, step.error
    assert engine.available == engine.table.pool.count, "all blocks are back"
    return answers, ends


def alone(params):
    return [[prompt[0] + 1 + count for count in range(params.max_new_tokens)] for prompt in PROMPTS]


def assert_others_are_whole(answers, ends, params, failed=3):
    for number, expected in enumerate(alone(params)):
        if number != failed:
            assert answers[number] == expected and ends[number] == ("length", None)


def test_logits_that_are_not_finite_end_their_sequence():
    class Overflowing(CountingEngine):
        def decode(self, slots, tokens, positions):
            logits = super().decode(slots, tokens, positions)
            logits[[token == 32 for token in tokens], 5] = np.nan
            return logits

    params = SamplingParams(4)
    answers, ends = run(Overflowing(slots=8, vocabulary=90), params)
    assert answers[3] == [31, 32] and ends[3][0] == "error" and "not finite" in str(ends[3][1])
    assert_others_are_whole(answers, ends, params)


def test_a_prompt_that_the_engine_cannot_take_ends_alone_and_a_device_that_fails_ends_all():
    class Choosy(CountingEngine):
        error = ValueError("no such prompt")

        def prefill(self, slots, prompts, starts=None):
            if [30] in prompts:
                raise self.error
            return super().prefill(slots, prompts)

    params = SamplingParams(4)
    answers, ends = run(Choosy(slots=8, vocabulary=90), params)
    assert answers[3] == [] and ends[3] == ("error", Choosy.error)
    assert_others_are_whole(answers, ends, params)
    Choosy.error = MemoryError("the device is full")
    with pytest.raises(MemoryError, match="the device is full"):
        run(Choosy(slots=8, vocabulary=90), params)


def test_a_generator_hands_out_the_other_answers_first(monkeypatch):
    generator = Generator(TeleChat(small_config(initializer_range=0.3)), max_length=32, batch_size=8)
    prompts = [[5 + number, 9, 3] for number in range(8)]
    params = SamplingParams(6)
    expected = generator.generate(prompts, params)
    choose = sampling.Sampler.__call__

    def failing(sampler, logits, previous_ids):
        if len(previous_ids) == 5 and previous_ids[0] == 8:
            raise ZeroDivisionError("in the fourth")
        return choose(sampler, logits, previous_ids)

    monkeypatch.setattr(sampling.Sampler, "__call__", failing)
    answers = {index: (ids, error) for index, ids, error in generator.answers(prompts, params)}
    assert answers[3][0] == expected[3][:2] and str(answers[3][1]) == "in the fourth"
    for index in (0, 1, 2, 4, 5, 6, 7):
        assert answers[index] == (expected[index], None)
    with pytest.raises(ZeroDivisionError, match="in the fourth"):
        generator.generate(prompts, params)
    with pytest.raises(ZeroDivisionError, match="in the fourth"):
        list(generator.stream(prompts[3], params))


def test_answers_come_when_they_are_complete():
    generator = Generator(TeleChat(small_config(initializer_range=0.3)), max_length=16, batch_size=2)
    prompts = [[5], [7] * 13, [9] * 12]  # with room for 15, 3 and 4 tokens
    assert [index for index, *_ in generator.answers(prompts, SamplingParams(20))] == [1, 2, 0]
