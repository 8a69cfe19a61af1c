"""What is left of a run: steps and what comes between them, in seconds that can be added up by hand."""

import pytest

from telechat.training.run_config import RunConfig
from telechat.training.time_left import TimeLeft


def time_left(batches=0, first_step=0, **settings):
    return TimeLeft(RunConfig.from_dict({"total_steps": 10, **settings}), batches, first_step)


def test_steps_alone_count_but_the_first_which_compiles():
    left = time_left(save_steps=0)
    left.took("step", 60.0, 1)
    assert left.after(1) == 9 * 60
    for number, seconds in ((2, 2.0), (3, 3.0), (4, 2.5)):
        left.took("step", seconds, number)
    assert left.after(4) == 6 * 2.5
    resumed = time_left(save_steps=0, first_step=6)
    resumed.took("step", 60.0, 7)
    resumed.took("step", 2.0, 8)
    assert resumed.after(8) == 2 * 2.0


@pytest.mark.parametrize("settings, evaluations, saves", [
    ({"save_steps": 4}, 2, 2),  # after 8 and 10
    ({"save_steps": 5}, 1, 1),
    ({"save_steps": 0}, 1, 1),
    ({"save_steps": 4, "eval_steps": 2}, 3, 2),  # 6, 8, 10
    ({"save_steps": 50, "eval_steps": 3}, 2, 1)])  # 6, 9
def test_evaluations_answers_and_checkpoints_to_come_count(settings, evaluations, saves):
    left = time_left(batches=6, **settings)
    left.took("step", 9.0, 1)
    left.took("step", 1.0, 2)
    assert left.after(5) == 5 * 1.0 + evaluations * 6 / 3  # a third of a step a batch, until one was measured
    for what, seconds in (("evaluation", 30.0), ("answers", 100.0), ("save", 1000.0)):
        left.took(what, seconds)
    assert left.after(5) == 5 + 30 * evaluations + 1100 * saves
    assert left.after(10) == 0


def test_without_evaluation_data_there_is_none():
    left = time_left(save_steps=5, eval_steps=1)
    left.took("step", 1.0, 1)
    assert left.after(5) == 5
