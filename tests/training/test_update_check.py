"""An update that does not arrive stops the run, whatever part of it is lost."""

import numpy as np
import pytest
from mindspore import ops

from telechat import TeleChat, TrainConfig, Trainer
from telechat.training.optimizer import AdamW
from telechat.training.update_check import UpdateLost
from tests.test_model import small_config

IDS = np.random.default_rng(0).integers(4, 96, (2, 12))


def trainer(dtype="float32", **settings):
    train = TrainConfig(learning_rate=1e-3, lr_schedule="constant", total_steps=4, dtype=dtype, **settings)
    return Trainer(TeleChat(small_config(), dtype), train)


@pytest.mark.parametrize("dtype, lost, words", [
    ("float32", "masters", "^update 1 of transformer.word_embeddings.weight did not arrive: its weights went from"),
    ("bfloat16", "first", "^update 1 of .*.weight did not arrive: its moments went from .* nothing would be learnt"),
    ("bfloat16", "weights", "^after update 1 .* is not its float32 master weight, rounded to bfloat16"),
])
def test_what_is_lost_is_said(monkeypatch, dtype, lost, words):
    training = trainer(dtype)
    optimizer = training.optimizer
    if lost == "weights":
        monkeypatch.setattr(AdamW, "refresh_parameters", lambda self: None)
    else:
        # The graphs are given copies.
        kept = {id(tensor) for group in getattr(optimizer, lost) for tensor in group}
        update = optimizer._update
        optimizer._update = lambda *given: update(*(ops.deepcopy(x) if id(x) in kept else x for x in given))
    with pytest.raises(UpdateLost, match=words):
        training.train_step(IDS, IDS)


def test_an_update_of_another_size_is_noticed():
    training = trainer()
    update = training.optimizer._update
    training.optimizer._update = lambda clip, step, rate, *others: update(clip, step, rate * 1.1, *others)
    with pytest.raises(UpdateLost, match="should be"):
        training.train_step(IDS, IDS)


def test_only_the_first_two_updates_that_change_anything_are_compared():
    training = trainer()
    for _ in range(2):
        training.train_step(IDS, IDS)
    update = training.optimizer._update
    training.optimizer._update = lambda clip, step, rate, *others: update(clip, step, rate * 1.1, *others)
    training.train_step(IDS, IDS)
