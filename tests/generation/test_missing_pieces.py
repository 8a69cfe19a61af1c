"""A model with more embedding rows than its tokenizer has pieces: the rest is never drawn, wherever tokens are chosen."""

import json
import types

import numpy as np
import pytest

from telechat import Generator, SamplingParams, TeleChat, TeleChatConfig, Tokenizer
from telechat.generation.session import sampling_params
from telechat.generation.settings import GenerationSettings
from telechat.serving import protocol
from telechat.training.sample_answers import SampleAnswers
from tests.conftest import save_small_model

PIECES, ROWS = 1664, 1700


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A model whose rows without a piece have the largest logits nearly always; its directory."""
    directory = tmp_path_factory.mktemp("padded") / "checkpoint"
    save_small_model(directory, vocab_size=ROWS, training_seqlen=64)
    model = TeleChat.from_pretrained(directory)
    head = model.head_weight.asnumpy()
    head[PIECES:] *= 50
    tensors = {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()}
    tensors[model.head_weight.name] = head
    TeleChat(model.config, tensors=lambda name, shape: tensors[name]).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def generator(padded):
    return Generator(TeleChat.from_pretrained(padded), 32)


@pytest.fixture(scope="module")
def settings(padded):
    return GenerationSettings.load(padded, TeleChatConfig.from_pretrained(padded))


PROMPT = [20, 300, 400, 21]


@pytest.mark.parametrize("fields", [{}, dict(temperature=1.0, seed=1), dict(temperature=2.0, seed=2, top_k=40, top_p=0.9),
                                    dict(temperature=1.0, seed=3, repetition_penalty=3.0)])
def test_the_library_and_generate(generator, settings, fields):
    plain, = generator.generate([PROMPT], SamplingParams(12, **fields))
    assert max(plain) >= PIECES, "told nothing, the library takes such a row"
    params = sampling_params(settings, generator, max_new_tokens=12, **fields)
    answer, = generator.generate([PROMPT], params)
    assert max(answer) < PIECES and len(answer) > 1
    settings.tokenizer.decode(answer)


def test_greedy_takes_the_likeliest_of_the_others(generator, settings):
    answer = next(generator.stream(PROMPT, sampling_params(settings, generator, max_new_tokens=1)))
    logits = generator.model([PROMPT]).asnumpy()[0, -1]
    assert logits.argmax() >= PIECES and answer == logits[:PIECES].argmax()


def test_the_server(settings):
    model = protocol.Model("m", settings, 32, ROWS)
    for ask in (protocol.read_chat({"model": "m", "messages": [{"role": "user", "content": "hi"}]}, model),
                protocol.read_completion({"model": "m", "prompt": PROMPT, "logprobs": 5}, model)):
        assert ask.params.excluded_ids == tuple(range(PIECES, ROWS))


def test_sample_answers_of_the_trainer(padded, generator, settings, tmp_path, monkeypatch):
    tokens = {"pad": {"id": 3}, "end": {"id": 2}}
    batch = np.array([[*PROMPT, 500, 2]]), np.array([[-100] * 4 + [500, 2]])
    dataset = types.SimpleNamespace(info={"settings": {"tokens": tokens}}, evaluation_batches=lambda: [batch])
    answers = SampleAnswers(str(tmp_path), generator.model, settings.tokenizer, dataset, held_out=False)
    answers.ask(1)
    expected, = generator.generate([PROMPT], SamplingParams(60, stop_ids=(2,), excluded_ids=range(PIECES, ROWS)))
    first, = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert first["answer"].startswith(settings.tokenizer.decode(expected, skip_control_tokens=True)[:5])

    def break_off(logits, token, *rest):
        raise FloatingPointError("the model's logits are not finite")

    monkeypatch.setattr("telechat.generation.sampling.distribution", break_off)
    answers.ask(2)
    assert answers.answers[-1]["answer"] == " [the model's logits are not finite]", "training goes on"


def test_a_tokenizer_says_which_rows_it_has_no_piece_for(padded, shared):
    assert Tokenizer.from_pretrained(padded).missing_ids(ROWS) == tuple(range(PIECES, ROWS))
    tokenizer = Tokenizer.from_pretrained(shared / "data" / "telechat_52b.tokenizer.model")
    assert tokenizer.missing_ids(80_896) == tuple(range(80_000, 80_896)) and tokenizer.missing_ids(80_000) == ()
