"""A server with several LoRA adapters: each is a model of its own, and all are answered in one batch."""

import concurrent.futures

import numpy as np
import openai
import pytest

from telechat import Generator, InputError, SamplingParams, TeleChat, TeleChatConfig, Tokenizer
from telechat.adapters.named import factor_bytes, read_lora
from telechat.adapters.peft import Adapter
from telechat.adapters.unmerged import AdapterSet
from tests.adapter_files import write_adapter
from tests.conftest import save_small_model
from tests.serving.conftest import start

NAMES = ("one", "two")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    save_small_model(folder / "base", training_seqlen=128)
    config = TeleChatConfig.from_pretrained(folder / "base")
    for number, name in enumerate(NAMES):
        write_adapter(folder / name, config, 2 + number, seed=number, size=0.3)
    return folder


def test_each_model_answers_as_it_does_alone(places):
    """Twelve requests at once to the base and two adapters; a name that is not there is refused as ever."""
    running, said = start(places / "base", *(flag for name in NAMES for flag in ("--lora", f"{name}={places / name}")),
                          "--max_batch", 4, "--max_length", 128)
    try:
        assert "beside it, with adapters: 'one', 'two'\n" in said
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=120)
        models = ["base", *NAMES]
        assert [model.id for model in client.models.list().data] == models
        assert client.models.retrieve("two").id == "two"
        requests = [(model, [20, 300 + number, 400, 21]) for number in range(4) for model in models]
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda ask: client.completions.create(
                model=ask[0], prompt=ask[1], max_tokens=10, temperature=0, logprobs=0), requests))
        assert [answer.model for answer in answers] == [model for model, _ in requests]
        generators = {name: Generator(TeleChat.from_pretrained(places / "base", lora=lora), 128)
                      for name, lora in (("base", None), *((name, places / name) for name in NAMES))}
        texts, tokenizer = {}, Tokenizer.from_pretrained(places / "base")
        for (model, prompt), answer in zip(requests, answers):
            texts[model, tuple(prompt)] = answer.choices[0].text
            tokens = generators[model].generate([prompt], SamplingParams(10, stop_ids=(2,)))[0]
            assert len(answer.choices[0].logprobs.tokens) == len(tokens)
            assert answer.choices[0].text == tokenizer.decode(tokens, skip_control_tokens=True)
        assert len({texts[model, tuple(requests[0][1])] for model in models}) == 3
        for call in (lambda: client.completions.create(model="three", prompt="x"), lambda: client.models.retrieve("three")):
            with pytest.raises(openai.NotFoundError, match="'base', 'one', 'two'") as refused:
                call()
            assert refused.value.code == "model_not_found"
    finally:
        assert running.stop()[0] == 0


@pytest.mark.parametrize("values, expected", [
    ([], (None, {})), (["/a/b"], ("/a/b", {})), (["x=/a/b", "y=c"], (None, {"x": "/a/b", "y": "c"})),
    (["/a/rank=16"], ("/a/rank=16", {})), (["x=/a/rank=16"], (None, {"x": "/a/rank=16"}))])
def test_what_lora_says(values, expected):
    assert read_lora(values, "base") == expected


@pytest.mark.parametrize("values, said", [
    (["a", "b"], "--lora a is added to the weights, which goes with one adapter alone; give each a name: --lora name=a"),
    (["x=a", "b"], "--lora b is added to the weights, which goes with one adapter alone"),
    (["x=a", "x=b"], "--lora x=b: 'x' is the name of another model here; give each one of its own"),
    (["base=a"], "--lora base=a: 'base' is the name of another model here")])
def test_what_lora_cannot_say(values, said):
    with pytest.raises(InputError, match=said):
        read_lora(values, "base")


def test_the_bytes_of_factors(places):
    """What the check of memory adds is what is held."""
    config = TeleChatConfig.from_pretrained(places / "base")
    adapters = {name: Adapter(places / name, config) for name in NAMES}
    assert factor_bytes(adapters, config) == AdapterSet(adapters, config, np.asarray).nbytes
