"""What 8 and 4 bits cost the demo model, on the conversations that are held out of the calibration."""

import contextlib
import io

import pytest

from telechat.checkpoint.reader import CheckpointReader
from tests.conftest import ROOT, load_tool
from tests.quantization.test_quantise import perplexity

DEMO = ROOT / "demo" / "run" / "final"
TEXT = ROOT / "samples" / "conversations.jsonl"


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """How much higher the perplexity becomes, as a share: by GPTQ of 8 and 4 bits, and of 4 rounded to the nearest."""
    if not (DEMO / "config.json").exists():
        pytest.skip("needs demo/run/final, of make demo")
    before, found = perplexity(DEMO, TEXT), {}
    for name, bits, calibration in (("8", "8", ["--calibration", str(TEXT)]), ("4", "4", ["--calibration", str(TEXT)]),
                                    ("4 rounded", "4", [])):
        directory = tmp_path_factory.mktemp("demo") / "q"
        with contextlib.redirect_stdout(io.StringIO()):
            load_tool("quantize").main(["--load_checkpoint", str(DEMO), "--output_dir", str(directory), "--bits", bits,
                                         "--group_size", "64", *calibration])
        assert CheckpointReader(directory, quantised=True).config.extra["quantization_config"]["bits"] == int(bits)
        found[name] = perplexity(directory, TEXT) / before - 1
    return found


def test_8_bits_lose_less_than_half_a_percent(losses):
    assert abs(losses["8"]) < 0.005


def test_gptq_of_4_bits_loses_less_than_half_of_rounding(losses):
    assert 0 < losses["4"] < losses["4 rounded"] / 2
