"""An update that does not arrive stops the run, whatever part of it is lost."""

import types

import numpy as np
import pytest
from mindspore import ops

from telechat import TeleChat, TrainConfig, Trainer
from telechat.training.optimizer import AdamW
from telechat.training.update_check import UpdateCheck, UpdateLost
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
        monkeypatch.setattr(AdamW, "refresh_parameters", lambda self, updated: None)
        update = optimizer._update
        optimizer._update = lambda *given, copies: update(*given)
    else:
        # The graphs are given copies.
        kept = {id(tensor) for group in getattr(optimizer, lost) for tensor in group}
        update = optimizer._update
        optimizer._update = lambda *given, copies: update(*(ops.deepcopy(x) if id(x) in kept else x for x in given))
    with pytest.raises(UpdateLost, match=words):
        training.train_step(IDS, IDS)


def test_an_update_of_another_size_is_noticed():
    training = trainer()
    update = training.optimizer._update
    training.optimizer._update = lambda clip, step, rate, *others, copies: update(clip, step, rate * 1.1, *others)
    with pytest.raises(UpdateLost, match="should be"):
        training.train_step(IDS, IDS)


def test_the_formula_and_what_is_allowed_beside_it():
    """AdamW as torch computes it, in float64, on the fourth update of four values."""
    config = TrainConfig(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    check = UpdateCheck.__new__(UpdateCheck)
    check._optimizer = types.SimpleNamespace(config=config, updates=4)
    weight, gradient = np.array([0.1, -0.2, 1e6, 1e-3]), np.array([0.5, -0.25, 0.125, 1.0])
    first, second = np.array([0.01, -0.2, 0.3, 0.0]), np.array([0.25, 0.01, 0.3, 0.5])
    moments = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient ** 2
    step = moments[0] / (1 - 0.9 ** 4) / (np.sqrt(moments[1] / (1 - 0.95 ** 4)) + 1e-8)

    def compare(decays, change=(1, 1, 1, 1)):
        new = weight * (1 - 0.01 * 0.1 * decays) - 0.01 * step
        check._compare("w", (weight, first, second), (weight + (new - weight) * change, *moments), gradient, 0.01, decays)
    compare(True)
    compare(False)
    compare(True, (1.01, 0.99, 1.01, 0.99))
    with pytest.raises(UpdateLost, match="went from 0.1 to"):
        compare(False, (1.03, 1, 1, 1))
    with pytest.raises(UpdateLost, match="went from 0.001 to"):
        compare(True, (1, 1, 1, 0.97))
    compare(False, (1, 1, 30, 1))  # of a value so large a float32 holds no smaller change


def test_only_the_first_two_updates_that_change_anything_are_compared():
    training = trainer()
    for _ in range(2):
        training.train_step(IDS, IDS)
    update = training.optimizer._update
    training.optimizer._update = lambda clip, step, rate, *others, copies: update(clip, step, rate * 1.1, *others)
    training.train_step(IDS, IDS)
