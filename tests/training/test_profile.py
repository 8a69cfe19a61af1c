"""The table of a profile, and which steps are profiled."""

import pytest

from telechat import InputError
from telechat.training import profile
from telechat.training.profile import StepProfiler, summary


def write(folder, name, header, rows):
    folder.mkdir(parents=True)
    (folder / name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


HEAD = "            operation                   calls    time ms   share"


def test_what_took_longest_comes_first(tmp_path):
    write(tmp_path / "a", "cpu_op_type_info_0.csv", "op_type,type_occurrences,total_compute_time",
          ["Mul,200,1.5", "MatMul,10,6.0", "Add,3,0.5"])
    assert summary(tmp_path) == [HEAD, "            MatMul                         10        6.0   75.0%",
                                 "            Mul                           200        1.5   18.8%",
                                 "            Add                             3        0.5    6.2%"]


@pytest.mark.parametrize("small, others", [(1, []), (4, ["            3 others                      9        3.0    8.1%"])])
def test_a_card_s_statistics_are_in_microseconds_and_what_is_behind_the_twelfth_is_summed_up(tmp_path, small, others):
    write(tmp_path / "a", "op_statistic.csv", "OP Type,Count,Total Time(us)",
          [f"Op{number},2,3000" for number in range(11)] + [f"Small{number},3,1000" for number in range(small)])
    lines = summary(tmp_path)
    assert len(lines) == 13 + len(others) and lines[13:] == others
    assert lines[1] == f"            Op0                             2        3.0 {3 / (33 + small):7.1%}"
    assert lines[12] == f"            Small0                          3        1.0 {1 / (33 + small):7.1%}"


def test_without_statistics_there_is_no_table(tmp_path):
    assert summary(tmp_path) == []
    write(tmp_path / "a", "op_statistic.csv", "OP Type,Count,Total Time(us)", ["Idle,1,0"])
    assert summary(tmp_path)[1] == "            Idle                            1        0.0    0.0%"


def test_steps_are_profiled_after_two_that_compile(tmp_path, monkeypatch):
    from mindspore import profiler

    calls = []

    class Recorded:
        def __init__(self, activities, **_):
            calls.append([activity.name for activity in activities])

        def __getattr__(self, name):
            return lambda: calls.append(name)

    monkeypatch.setattr(profiler, "profile", Recorded)
    monkeypatch.setattr(profile, "summary", lambda folder: ["table"])
    profiled, shown = StepProfiler(tmp_path, 2), []
    for step in range(6):
        profiled.begin_step()
        calls.append(step)
        shown.append(profiled.end_step())
    assert calls == [0, 1, ["CPU"], "start", 2, "step", 3, "step", "stop", 4, 5]
    assert shown == [[], [], [], [f"profile     2 steps in {tmp_path / 'profile'}", "table"], [], []]
    early = StepProfiler(tmp_path, 9)
    for step in range(3):
        early.begin_step()
        early.end_step()
    assert early.finish()[0] == f"profile     1 steps in {tmp_path / 'profile'}" and early.finish() == []
    with pytest.raises(InputError, match="--profile must be a number of steps of at least 1, not 0"):
        StepProfiler(tmp_path, 0)
    assert StepProfiler(tmp_path, 1).steps == 1
