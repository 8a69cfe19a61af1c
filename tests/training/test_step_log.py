"""metrics.jsonl over several processes: what a crash leaves at its end is passed over."""

import json

import pytest

from telechat.training.step_log import StepLog


@pytest.mark.parametrize("end", ['{"step": 4, "lo', "\0" * 300, "\ufeff\n", "3\n", "{}\n", '{"step": null}\n', b"\xd7\xff\n"])
def test_a_resumed_run_goes_on_behind_the_last_whole_line(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    log = StepLog(str(path))
    for step in (1, 2, 3):
        log.add({"step": step, "loss": 0.5})
    with open(path, "ab") as file:
        file.write(end if isinstance(end, bytes) else end.encode())
    again = StepLog(str(path), first_step=2)
    again.add({"step": 3, "loss": 0.25})
    expected = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25}]
    assert again.records == expected == [json.loads(line) for line in path.read_text().splitlines()]
    assert StepLog(str(path)).records == [] and path.read_bytes() == b""  # a new run
