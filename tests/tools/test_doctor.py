"""tools/doctor.py: a verdict, and a refusal in one sentence."""

import re

import pytest

from telechat import version
from telechat.errors import InputError
from tests.conftest import assert_refused


def test_a_good_machine(tool):
    result = tool("doctor.py")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^mindspore   \d+\.\d+", result.stdout, re.M)
    assert "device      CPU" in result.stdout
    for kernel in ("product", "norm", "SwiGLU", "rotation", "short rotation", "attention", "documents", "dropout"):
        error, gradient_error = re.search(rf"^  {kernel} +(\S+) (\S+) good$", result.stdout, re.M).groups()
        assert float(error) < 1e-5 and float(gradient_error) < 1e-5
    assert "  dropout masks     good\n  sums of gradients good\n" in result.stdout
    assert "generation 8 tokens through the cache good" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("verdict     all that was tried is right")


def test_ascend_kernels_on_a_cpu_are_refused(tool):
    assert_refused(tool("doctor.py", "--kernels", "ascend"), "kernels", "CPU", "portable")


@pytest.mark.parametrize("installed, fits", [("2.7.1", False), ("2.8.0", True), ("2.10.0", True), ("2.11.0", False)])
def test_mindspore_outside_the_bounds_is_refused(monkeypatch, installed, fits):
    monkeypatch.setattr(version.importlib.metadata, "version", lambda name: installed)
    if fits:
        version.check_mindspore()
    else:
        with pytest.raises(InputError, match=rf"{installed}.*install mindspore from 2.8 to below 2.11"):
            version.check_mindspore()


def test_the_self_test_sees_a_wrong_kernel(monkeypatch):
    """A norm without its weight: wrong results, and a wrong gradient."""
    import mindspore as ms
    from telechat.nn import portable_kernels
    from telechat.nn.kernels import Kernels
    from telechat.nn.self_test import check_kernels

    right = portable_kernels.rms_norm

    def heavier(x, weight, epsilon):
        return right(x, weight * 1.1, epsilon)

    monkeypatch.setattr(portable_kernels, "rms_norm", heavier)
    errors = {name: (error, gradient) for name, error, gradient, allowed in check_kernels(Kernels(ms.float32))}
    assert min(errors["norm"]) > 1e-2
    assert max(errors["SwiGLU"]) < 1e-5
