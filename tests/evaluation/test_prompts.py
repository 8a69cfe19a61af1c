"""Prompts that begin alike, read into a cache: the logits of each read whole, and what they share computed once."""

import numpy as np

from telechat import TeleChat
from telechat.evaluation.forward import Forward
from telechat.evaluation.prompts import PromptLogits
from tests.test_model import small_config


def test_logits_are_those_without_a_cache():
    model = TeleChat(small_config(initializer_range=0.3))
    rng = np.random.default_rng(0)
    examples = rng.integers(0, 96, 40).tolist()
    prompts = [examples + rng.integers(0, 96, count).tolist() for count in (3, 9, 17, 5)]
    read = PromptLogits(model)
    logits, expected = np.concatenate([read(prompts[:1]), read(prompts[1:])]), Forward(model).last_logits(prompts)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    table = read._engine.table
    assert table.hits + table.misses == sum(map(len, prompts)) and table.hits == 40 + 2 * 32  # the last block, begun, goes to one
