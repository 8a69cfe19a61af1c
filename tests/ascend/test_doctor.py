"""tools/doctor.py on the simulated card: all is right there, and each fault that was found on it is said."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# Functions of doctor_faults.py, the dtype, and what the verdict says then.
FAULTS = {
    "weights_on_the_host": ("float32", "in host memory, where a graph's updates are lost"),
    "weights_on_the_host_unnoticed": ("float32", "is not its float32 master weight, rounded to float32"),
    "kernels_for_inference_in_training": ("float32", "infer_boost is on in this process, whose kernels have no gradients"),
    "dropout_on_the_host": ("bfloat16", "dropout masks of attention are drawn on the host"),
    "dropout_that_is_not_scaled_up": ("bfloat16", "dropout of outputs multiplies what it keeps by 1.0"),
    "sums_in_the_gradients_dtype": ("bfloat16", "sums of gradients lose small parts"),
    "rotation_with_heads_first": ("bfloat16", "the kernel after rotation, heads of 128, fails: "),
    "a_step_counted_from_one": ("bfloat16", "update 1 of "),
}
# The same for generation, which is tried in processes of their own.
GENERATION_FAULTS = {
    "kernels_for_inference_left_off": ("generation failed", "aclnnReshapeAndCache"),
    "blocks_of_128_tokens": ("generation failed", "head_dim * table_block_size > 16384 is not supported, got 160 * 128"),
    "decoding_without_pages": ("decoding with heads of 128 does not use PagedAttention",),
    "lengths_without_the_new_token": ("generation through the cache with heads of 128 differs from the model without it",),
}
LONGEST = 450  # characters of a problem in the verdict
# Before the doctor: its probes have the fault too.
IN_PROBES = """
import subprocess
run = subprocess.run
def run_with_fault(command, **options):
    assert command[1:3] == ["-m", "telechat.diagnosis.probe"]
    start = ("import sys; from tests.ascend import doctor_faults; doctor_faults.{}(); "
             "from telechat.diagnosis import probe; probe.main(sys.argv[1:])")
    return run([command[0], "-c", start, *command[3:]], **options)
subprocess.run = run_with_fault
"""
GENERATION_ALONE = """
from tools import doctor
problems = []
doctor.try_generation_alone("bfloat16", problems)
sys.exit(doctor.verdict(problems))
"""
NO_GENERATION = "from tools import doctor\ndoctor.try_generation_alone = lambda *arguments: None\n"


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
        for kernel in ("product", "norm", "SwiGLU", "rotation", "short rotation", "attention", "documents", "dropout"):
            assert any(line.startswith(f"  heads of {dim} {kernel}") and line.endswith("good") for line in lines)
        assert f"  generation, heads of {dim}, two lengths of prompts good" in lines
        assert any(line.startswith(f"  training, heads of {dim}, 2048 tokens: loss ") and line.endswith("good") for line in lines)
    assert lines[-1] == "verdict     all that was tried is right: this machine can train and generate"


def verdict_of(result):
    """The problems, of a doctor that found some."""
    assert result.returncode == 1, result.stdout + result.stderr[-2000:]
    verdict = result.stdout.split("verdict     do not train here yet:\n")[1]
    problems = [line for line in verdict.splitlines() if line.strip()]
    assert all(line.startswith("  - ") and len(line) < LONGEST for line in problems), verdict
    return verdict


@pytest.mark.ascend
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_said(doctor, fault):
    dtype, words = FAULTS[fault]
    result = doctor("--dtype", dtype, "--length", "64",
                    before=f"{NO_GENERATION}from tests.ascend import doctor_faults; doctor_faults.{fault}()")
    assert words in verdict_of(result)


@pytest.mark.ascend
@pytest.mark.parametrize("fault", GENERATION_FAULTS)
def test_a_fault_of_generation_is_said(doctor, fault):
    verdict = verdict_of(doctor(before=IN_PROBES.format(fault) + GENERATION_ALONE))
    assert all(word in verdict for word in GENERATION_FAULTS[fault])


@pytest.mark.ascend
def test_the_other_kernel_of_paged_attention_is_not_used(doctor):
    verdict = verdict_of(doctor(before=GENERATION_ALONE, MS_INTERNAL_DISABLE_CUSTOM_KERNEL_LIST="PagedAttention"))
    assert "does not use PagedAttention: MS_INTERNAL_DISABLE_CUSTOM_KERNEL_LIST names PagedAttention" in verdict


@pytest.mark.ascend
def test_the_first_hour(doctor, tmp_path):
    result = doctor("--first-hour", "--length", "64", SIM_DEVICES="2")
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    report = (tmp_path / "first_hour.txt").read_text()
    assert [line[0] for line in report.splitlines() if line[1:3] == ". "] == list("123456789")
    assert "WRONG" not in report and "FAILED" not in report
    assert "a weight left on the host moved by [0.0, 0.0]" in report
    assert "of keys written to a cache on the device arrived [1.0, 1.0] good" in report
    assert "verdict     all that was tried is right" in report
    assert len(re.findall(r"^   launched by .*: a step takes [\d.]+ s, the update \d+% of it, head and loss \d+%$", report, re.M)) == 2
    assert re.search(r"^   peak memory [\d.]+ GB, during the update [\d.]+ GB$", report, re.M)
    assert re.search(r"^   answers took [\d.]+, [\d.]+, [\d.]+ s", report, re.M)
