"""The simulated card is strict: about whose memory it is, about what was freed, and about order."""

import json
import os
import subprocess
import sys

import pytest

from simulator.environment import environment, unavailable

if unavailable():
    pytest.skip(unavailable(), allow_module_level=True)

from tests.conftest import ROOT  # noqa: E402


def run(scenario, **variables):
    return subprocess.run([sys.executable, "-m", "tests.simulator.run_runtime", scenario], capture_output=True, text=True,
                          cwd=ROOT, env={**os.environ, **variables}, timeout=60)


def result(scenario, **variables):
    finished = run(scenario, **variables)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_an_operator_refuses_a_host_pointer():
    assert "host memory" in result("host_pointer")


def test_what_was_freed_is_gone_and_every_stream_says_so():
    for message in result("freed"):
        assert "freed" in message and "aclnnAdd" in message


def test_the_host_cannot_read_device_memory():
    finished = run("host_reads_device")
    assert finished.returncode < 0 and "device memory without a copy" in finished.stderr


def test_new_memory_is_not_a_number():
    assert result("new_memory") == ["nan"] * 8


def test_a_copy_arrives_when_its_stream_comes_to_it():
    assert result("late_copy") == [[0] * 8, [5] * 8]


def test_streams_are_ordered_by_events_alone():
    assert result("two_streams") == [[1] * 8, [2] * 8]


def test_random_delays_show_a_missing_event():
    without, with_event = result("delayed", SIM_DELAY="3")
    assert without > 0 and with_event == 0


def test_memory_has_a_limit():
    first, second, third = result("memory", SIM_MEMORY="1GB")
    assert first is None and third is None
    assert "memory" in second and "629145600" in second, second


UPDATES = """
import json
import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

ms.set_device("Ascend")

@ms.jit
def add_one(x):
    return ops.assign(x, x + 1)

def kept(x):
    add_one(x)
    return float(x.asnumpy()[0])

class Holder(nn.Cell):
    def __init__(self, parameter):
        super().__init__()
        self.parameter = parameter

    @ms.jit
    def construct(self):
        return ops.assign(self.parameter, self.parameter + 1)

zeros = np.zeros(4, np.float32)
results = {"Tensor": kept(Tensor(zeros)), "from_numpy": kept(Tensor.from_numpy(zeros.copy())),
           "same dtype": kept(Tensor(zeros).astype(ms.float32)), "to": kept(Tensor(zeros).to("Ascend")),
           "ops": kept(ops.zeros(4, ms.float32)), "other dtype": kept(Tensor(zeros).astype(ms.float16).astype(ms.float32))}
parameter = Parameter(Tensor(zeros))
early = parameter.data
holder = Holder(parameter)
holder()
holder()
results["parameter"] = float(parameter.asnumpy()[0])
results["data taken on the host"] = float(early.asnumpy()[0])
late = parameter.data
add_one(late)
results["data taken on the card"] = [float(late.asnumpy()[0]), float(parameter.asnumpy()[0])]
print(json.dumps(results))
"""


def test_an_update_in_place_is_lost_on_host_tensors_and_kept_on_the_card(tmp_path):
    """The fault that MindSpore does not report and the simulator shows."""
    script = tmp_path / "updates.py"  # a jitted function must live in a file
    script.write_text(UPDATES)
    finished = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment(), cwd=tmp_path,
                              timeout=300)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout.splitlines()[-1])
    lost = {"Tensor", "from_numpy", "same dtype", "data taken on the host"}
    assert {name for name, value in found.items() if value == 0} == lost, found
    assert found["to"] == found["ops"] == found["other dtype"] == 1 and found["parameter"] == 2
    assert found["data taken on the card"] == [3, 3]
