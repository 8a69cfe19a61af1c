"""Resident memory of processes: quantising goes a layer at a time, and quantised weights stay so while they answer."""

import json
import subprocess
import sys

import pytest

from telechat import TeleChat
from telechat.checkpoint.layout import parameter_shapes
from telechat.generation.memory import weight_bytes
from tests.conftest import ROOT
from tests.test_model import small_config

MB = 1e6
SCRIPT = """
import json, re, sys

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

from telechat import Generator, SamplingParams, TeleChat
from telechat.quantization.quantise import quantise

what, directory, output = sys.argv[1:]
before = peak()
if what == "quantise":
    quantise(directory, output, 4, 128, say=lambda line: None)
else:
    model = TeleChat.from_pretrained(directory)
    Generator(model, 64).generate([[5, 6, 7]], SamplingParams(4))
print(json.dumps(peak() - before))
"""


def growth(what, directory, output=""):
    """Bytes by which a process's peak grew while it quantised, or loaded a model and answered."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, what, str(directory), str(output)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(config, directory) of 16 layers of 13 MB in float32, and little else."""
    config = small_config(hidden_size=512, n_head=8, n_layer=16, ffn_hidden_size=1408)
    directory = tmp_path_factory.mktemp("memory") / "model"
    TeleChat(config).save_pretrained(directory)
    assert sum(4 * size for size in map(_elements, parameter_shapes(config).values())) > 200 * MB
    return config, directory


def _elements(shape):
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def test_memory(model, tmp_path):
    config, directory = model
    assert growth("quantise", directory, tmp_path / "q") < 100 * MB
    quantised = json.loads((tmp_path / "q/config.json").read_text())
    assert quantised["quantization_config"]["bits"] == 4
    packed, plain = growth("answer", tmp_path / "q"), growth("answer", directory)
    assert plain > weight_bytes(config, 4) > 200 * MB
    assert packed < 100 * MB
