"""tools/doctor.py on the simulated card: all is right there, and each fault that was found on it is said."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

# What is put back: statements before the doctor runs, and what its verdict says then.
FAULTS = {
    "weights on the host": (
        "from telechat.nn import device\ndevice.move_to_device = lambda parameter: parameter",
        "in host memory, where a graph's updates are lost"),
    "weights on the host, unnoticed": (
        "from telechat.nn import device\nfrom telechat.training import trainer\n"
        "device.move_to_device = lambda parameter: parameter\ntrainer.check_placement = lambda tensors: None",
        "is not its float32 master weight, rounded to float32"),
    "kernels for inference in training": (
        "mindspore.set_context(jit_config={'jit_level': 'O0', 'infer_boost': 'on'})",
        "infer_boost is on in this process, whose kernels have no gradients"),
}
# The same for generation, which is tried in processes of their own: statements before its own, and the words.
GENERATION_FAULTS = {
    "kernels for inference left off": (
        "from telechat.nn import inference; inference.use_inference_kernels = lambda: inference._state.update(on=True)",
        ("generation failed", "aclnnReshapeAndCache")),
    "blocks of 128 tokens for heads of 160": (
        "from telechat.nn import paged_attention; paged_attention.LARGEST_BLOCK = 1 << 20",
        ("generation failed", "head_dim * table_block_size > 16384 is not supported, got 160 * 128")),
    "decoding without pages": (
        "from telechat.nn import inference; inference.use_inference_kernels = lambda: None",
        ("decoding with heads of 128 does not use PagedAttention",)),
}
PATCHED = """
import subprocess
run = subprocess.run
def run_patched(command, **options):
    assert command[1:3] == ["-m", "telechat.diagnosis.probe"]
    start = "import sys; {}; from telechat.diagnosis import probe; probe.main(sys.argv[1:])"
    return run([command[0], "-c", start, *command[3:]], **options)
subprocess.run = run_patched
"""
GENERATION_ALONE = """
from tools import doctor
problems = []
doctor.try_generation_alone("bfloat16", problems)
sys.exit(doctor.verdict(problems))
"""


@pytest.fixture
def doctor(tmp_path):
    """doctor(*flags, before="", **settings): what it prints on the simulated card, and its status."""
    from simulator.environment import environment, unavailable

    if unavailable():
        pytest.skip(unavailable())

    def run(*flags, before="", timeout=1800, **settings):
        start = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mindspore; mindspore.set_device('Ascend')\n{before}\n"
                 f"from tools import doctor; sys.argv = ['doctor.py', *{list(flags)!r}]; sys.exit(doctor.main())")
        return subprocess.run([sys.executable, "-c", start], env=environment(**settings), cwd=tmp_path, capture_output=True,
                              text=True, timeout=timeout)
    return run


@pytest.mark.ascend
def test_all_is_right(doctor):
    result = doctor()
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    lines = result.stdout.splitlines()
    for dim in (128, 160):
        for kernel in ("product", "norm", "SwiGLU", "rotation", "attention"):
            assert any(line.startswith(f"  heads of {dim} {kernel}") and line.endswith("good") for line in lines)
        assert f"  generation, heads of {dim}, two lengths of prompts good" in lines
    assert lines[-1] == "verdict     all that was tried is right: this machine can train and generate"


@pytest.mark.ascend
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_said(doctor, fault):
    before, words = FAULTS[fault]
    result = doctor("--dtype", "float32", before=before)
    assert result.returncode == 1
    verdict = result.stdout.split("verdict     do not train here yet:")[1]
    assert words in verdict


@pytest.mark.ascend
@pytest.mark.parametrize("fault", GENERATION_FAULTS)
def test_a_fault_of_generation_is_said(doctor, fault):
    change, words = GENERATION_FAULTS[fault]
    result = doctor(before=PATCHED.format(change) + GENERATION_ALONE)
    assert result.returncode == 1, result.stderr[-2000:]
    verdict = result.stdout.split("verdict     do not train here yet:")[1]
    assert all(word in verdict for word in words)


@pytest.mark.ascend
def test_the_first_hour(doctor, tmp_path):
    result = doctor("--first-hour", "--length", "64", SIM_DEVICES="2")
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    report = (tmp_path / "first_hour.txt").read_text()
    assert [line[0] for line in report.splitlines() if line[1:3] == ". "] == list("123456789")
    assert "WRONG" not in report and "FAILED" not in report
    assert "a weight left on the host moved by [0.0, 0.0]" in report
