"""A server's batch on the simulated card: a cache too small for all, shared beginnings, prompts in parts, several adapters
and guesses ahead at once, against answers that a CPU gives to each alone.
"""

import numpy as np
import pytest

from telechat import Generator, SamplingParams, TeleChat, TeleChatConfig
from tests.adapter_files import write_adapter
from tests.conftest import save_small_model

COUNT = 24  # tokens of an answer


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A directory, requests of two that outgrow the cache and four that begin alike, and their answers, each alone on the CPU."""
    directory = tmp_path_factory.mktemp("served")
    save_small_model(directory / "base", hidden_size=64, ffn_hidden_size=64, training_seqlen=512)
    config = TeleChatConfig.from_pretrained(directory / "base")
    adapters = [str(write_adapter(directory / name, config, 16, seed=seed, size=0.1)) for seed, name in ((1, "one"), (2, "two"))]
    rng = np.random.default_rng(0)
    begin = rng.integers(3, 1600, 60).tolist()
    prompts = [rng.integers(3, 1600, count).tolist() for count in (120, 110)]
    prompts += [(begin * 3)[:140] + [number] for number in range(40, 44)]
    # What is there is made likelier in the shared ones, so that the answers repeat themselves and guesses are right.
    requests = [[prompt, adapter, dict(max_new_tokens=150 if row < 2 else COUNT, temperature=float(row == 5), seed=row,
                                       frequency_penalty=0.0 if row < 2 else -2.0)]
                for row, (prompt, adapter) in enumerate(zip(prompts, [adapters[1], None, None, None, adapters[0], None]))]
    generators = {name: Generator(TeleChat.from_pretrained(directory / "base", lora=name), 288) for name in (None, *adapters)}
    alone = [generators[adapter].generate([prompt], SamplingParams(**settings))[0] for prompt, adapter, settings in requests]
    return str(directory / "base"), requests, alone


@pytest.mark.ascend
@pytest.mark.parametrize("dtype, blocks, speculate", [("float32", 24, 3), ("bfloat16", 4, 3), ("bfloat16", 4, 0)])
def test_a_batch_answers_as_each_alone(card, served, dtype, blocks, speculate):
    """float32 by graphs on a plain cache, to the token; bfloat16 by PagedAttention, as far as rounding lets them agree."""
    directory, requests, alone = served
    found = card("serving", directory, requests, dtype, 3, blocks, 48, speculate)
    assert ("PagedAttention" in found["kernels"]) == (dtype == "bfloat16")
    assert found["preemptions"] > 0 and found["hits"] >= found["block"] and found["free"] == blocks
    assert (found["right"] > 0) == (speculate > 0)
    assert [len(answer) for answer in found["answers"]] == [settings["max_new_tokens"] for _, _, settings in requests]
    if dtype == "float32":
        assert found["answers"] == alone
    else:
        same = [next((place for place, pair in enumerate(zip(*both)) if pair[0] != pair[1] or place == COUNT), COUNT)
                for both, (_, _, settings) in zip(zip(found["answers"], alone), requests) if not settings["temperature"]]
        assert np.mean(same) >= 0.6 * COUNT and min(same) >= 1, same


@pytest.mark.ascend
def test_prompts_read_together_fit_a_small_cache(card, served):
    """Filled up to 256 rows each, three prompts are more rows than the cache's 640 tokens, which ReshapeAndCache refuses."""
    directory, _, _ = served
    requests = [[list(range(3, 3 + count)), None, dict(max_new_tokens=4)] for count in (200, 10, 20)]
    found = card("serving", directory, requests, "bfloat16", 3, 4, None, 0)
    assert [len(answer) for answer in found["answers"]] == [4, 4, 4] and found["reads"] == [[0, 1], [2]]
