"""Learning-rate schedules against their formulas, and TrainConfig's checks."""

import math

import pytest

from telechat import InputError, TrainConfig
from telechat.training.schedule import learning_rate


@pytest.mark.parametrize("schedule, at", [
    ("cosine", lambda p: 1e-4 + 9e-4 * (1 + math.cos(math.pi * p)) / 2),
    ("linear", lambda p: 1e-4 + 9e-4 * (1 - p)),
    ("constant", lambda p: 1e-3),
])
def test_schedules(schedule, at):
    config = TrainConfig(learning_rate=1e-3, min_learning_rate=1e-4, lr_schedule=schedule, warmup_steps=4, total_steps=20)
    for step in range(4):
        assert learning_rate(config, step) == pytest.approx(1e-3 * (step + 1) / 4)
    for step in range(4, 20):
        assert learning_rate(config, step) == pytest.approx(at((step - 4) / 16))
    assert learning_rate(config, 20) == learning_rate(config, 25) == pytest.approx(at(1))


def test_warmup_ratio():
    assert TrainConfig(total_steps=200, warmup_ratio=0.03).resolved_warmup_steps == 6


@pytest.mark.parametrize("fields, words", [
    (dict(learning_rate=-1), "learning_rate"), (dict(learning_rate=float("nan")), "learning_rate"),
    (dict(lr_schedule="step"), "lr_schedule"), (dict(warmup_steps=1, warmup_ratio=0.1), "not both"),
    (dict(total_steps=0), "total_steps"), (dict(micro_batches=0), "micro_batches"), (dict(betas=(0.9,)), "betas"),
    (dict(betas=(0.9, 1.0)), "betas"), (dict(eps=0), "eps"), (dict(dtype="int8"), "dtype"), (dict(seed=-1), "seed"),
    (dict(learning_rate=1e-5, min_learning_rate=1e-4), "min_learning_rate"), (dict(warmup_ratio=2), "warmup_ratio"),
])
def test_values_out_of_range_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        TrainConfig(**fields)
