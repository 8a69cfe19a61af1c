"""The memory that training an adapter takes, as the estimate has it, of a process that trains one."""

import pytest

from benchmarks import memory


@pytest.mark.parametrize("name", [name for name in memory.CONFIGURATIONS if "adapter" in name])
def test_a_run_takes_what_the_estimate_says(name):
    peak, expected = memory.measure(memory.CONFIGURATIONS[name])
    assert expected == pytest.approx(peak, rel=memory.TOLERANCE)
